"""Sums of phi(k) v^T: linear attention, and the same with decay."""
