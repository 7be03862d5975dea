"""What is written and read back: whole files, folders that one process has; JSON with a format, version and schema."""
