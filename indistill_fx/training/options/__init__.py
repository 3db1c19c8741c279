"""How a run is trained, as the user asked: the options, and what they make."""
