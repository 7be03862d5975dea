"""What one torch call means: decomposed, canonicalised, recognised, once for every mode."""
