"""What is written and read back: files that are complete or absent; JSON with a format, a version and a schema."""
