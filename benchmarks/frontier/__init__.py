"""Accuracy against memory and time, for TraDy and for what people do instead (``python -m benchmarks.frontier``)."""
