"""Linear layers stored quantised, with their trained channels beside them."""
