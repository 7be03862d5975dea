"""The paper's experiment (arXiv 2510.19675) at a scale of hours: ``python -m benchmarks.paper``."""
