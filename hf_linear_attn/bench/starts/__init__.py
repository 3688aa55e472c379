"""Every method on real checkpoints: where it starts, what a short regression gains, what it costs."""
