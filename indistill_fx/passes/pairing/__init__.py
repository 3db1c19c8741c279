"""Which layers of teacher and student belong together."""
