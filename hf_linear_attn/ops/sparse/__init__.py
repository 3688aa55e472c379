"""Lists of key blocks: BigBird, Sparse Transformer."""
