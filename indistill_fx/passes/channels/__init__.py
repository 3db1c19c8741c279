"""How channels pass through operations: one rule per operation (`rules`)."""
