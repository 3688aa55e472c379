"""Other people's tests, from the source distributions of their packages."""
