"""Input channels: the table of layers, selections, their cost, and how channels are cut to fit."""
