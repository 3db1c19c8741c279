"""The two halves of a stage, cut out of the traced models."""
