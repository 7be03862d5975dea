"""The session: prepare, draw, follow the optimizer, checkpoint, delta, finish; rank."""
