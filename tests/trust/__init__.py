"""Random sequences of what users do, beside a reference that recomputes every answer from the weights."""
