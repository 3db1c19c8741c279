"""How channels run through operations: one rule an operation (`rules`)."""
