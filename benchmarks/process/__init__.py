"""Process memory: what the allocator adds to the ledger's peak, what a budget predicts, and runs under a hard limit."""
