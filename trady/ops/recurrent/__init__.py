"""Recurrent layers: cells, steps, and their backward pass by channel."""
