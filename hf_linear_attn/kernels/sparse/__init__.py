"""Softmax attention over lists of key blocks."""
