"""Which channels go, and what goes with them: `narrow` and `shrink`."""
