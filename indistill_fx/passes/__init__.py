"""The passes: one per file, each a function of values; `pipeline` composes them."""
