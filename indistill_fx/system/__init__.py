"""This machine: files, the terminal, the allocator, random numbers, and a user's own code."""
