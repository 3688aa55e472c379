"""Long-document embedders without training: a passage finds the rest of its document, and what that costs."""
