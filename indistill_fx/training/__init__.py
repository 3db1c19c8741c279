"""The trainer: Accelerate's loop around the stages."""
