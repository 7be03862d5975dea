"""What is written and read back: whole files; JSON with a format and a version."""
