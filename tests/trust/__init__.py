"""Random sequences of user actions beside a reference, other people's tests, and long numerics: `make test-trust`."""
