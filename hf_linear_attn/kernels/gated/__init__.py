"""Linear attention with gates of its own for each feature."""
