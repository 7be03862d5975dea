"""What a training step of any method takes, and what fits in a given memory, before there is a weight."""
