"""Floor 4: one model family per file; the registry key is Transformers' `model_type`."""
