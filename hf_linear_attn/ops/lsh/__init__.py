"""Locality-sensitive hashing: Reformer."""
