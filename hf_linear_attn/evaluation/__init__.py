"""Metrics, intervals, timings, memory and reports of comparisons between models."""
