"""The process that trains: what it has in memory, what its allocator gives back, imports that wait, other ranks."""
