"""Sliding windows, global rows, and a window with a linear tail."""
