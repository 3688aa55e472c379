"""Systems trained and tested under one budget, and the report of it."""
