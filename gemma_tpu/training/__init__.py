"""The training loop and all that watches it."""
