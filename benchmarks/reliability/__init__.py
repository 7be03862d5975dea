"""What is left of a run that is killed, asked to stop, started twice, or out of disk space."""
