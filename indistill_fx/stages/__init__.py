"""A training stage as one module: batch in, loss out."""
