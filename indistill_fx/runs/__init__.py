"""A run on disk: its directory, record and checkpoints."""
