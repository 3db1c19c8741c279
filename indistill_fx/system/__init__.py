"""This machine: files, the terminal, the allocator, random numbers, a user's own code; and values of any form."""
