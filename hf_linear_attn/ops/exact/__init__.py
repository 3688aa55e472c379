"""Whole rows of scores, in pieces: dense patterns, entmax, segments with a memory."""
