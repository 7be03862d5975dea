"""Peaks of any method told without weights, against the ledger of the real step."""
