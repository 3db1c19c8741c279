"""From a model spec to a module, without running what a file holds."""
