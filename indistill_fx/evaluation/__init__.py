"""How good a model is: accuracy, and retrieval by its features."""
