"""A training step without memory: its timeline of bytes, and the optimizer's share."""
