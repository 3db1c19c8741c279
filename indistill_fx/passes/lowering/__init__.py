"""Rewrites for a target: for speed, which leave every value as it is, and for int8, which rounds as the file will."""
