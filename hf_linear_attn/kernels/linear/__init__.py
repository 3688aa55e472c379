"""Linear attention: padding, weights, decay, states."""
