"""The command line: one file a command in ``commands/``; beside them what commands share."""
