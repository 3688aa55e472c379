"""Floor 1: functions on tensors, in plain PyTorch, and the choice of a backend for them."""
