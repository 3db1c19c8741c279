"""A run over several processes: what each takes, what they add up, how they wait for and notice each other."""
