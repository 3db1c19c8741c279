"""Rewrites for speed, which leave every value as it is."""
