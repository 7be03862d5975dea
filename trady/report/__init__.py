"""HTML pages, figures, and numbers for people (bytes, shares, bars); pages need no network."""
