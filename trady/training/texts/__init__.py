"""Texts: tables and files of them, as tokens in batches of like length, and what a model learns from them."""
