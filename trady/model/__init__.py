"""The user's module and batch: called, hooked, copied, and put back exactly as they were."""
