"""What the package knows of Transformers' internals."""
