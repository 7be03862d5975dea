"""The process that trains: what it has in memory, what its allocator gives back, and what it need not import."""
