"""One optimiser step, and what is read of it."""
