"""What is written and read back: files that are complete or absent; JSON with a format and a version."""
