"""Reports: pages that are read without the network."""
