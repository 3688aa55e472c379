"""Feature maps phi, and the gradients of maps that are computed again."""
