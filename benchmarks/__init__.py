"""Memory, speed and sparsity of fine-tuning, measured: each claim is one command (see README.md here)."""
