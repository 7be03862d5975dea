"""Finding a scheme of sparse updates (MCUNetV3, arXiv 2206.15472): what layers contribute, then the best sum of it."""
