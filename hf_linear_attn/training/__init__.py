"""Floor 8: training."""
