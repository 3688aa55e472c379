"""Measurements for result files: speed, other people's implementations, starts."""
