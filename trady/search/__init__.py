"""Searches a scheme of sparse updates (MCUNetV3, arXiv 2206.15472): contributions of layers, then the best sum."""
