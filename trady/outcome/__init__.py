"""Runs on one page: what fitted, what was learned, where, and how to do it again."""
