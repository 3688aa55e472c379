"""Softmax over the positions for each feature: efficient attention."""
