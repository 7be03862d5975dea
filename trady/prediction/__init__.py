"""A finished run in use: its model, what it takes, and what it says."""
