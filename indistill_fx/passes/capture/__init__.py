"""From a module to a traced graph that was compared with it."""
