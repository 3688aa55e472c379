"""What a conversion loses: spectra, errors per layer and head, attention patterns."""
