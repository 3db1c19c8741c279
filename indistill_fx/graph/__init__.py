"""Tools on fx graphs and on modules, which know nothing of distillation."""
