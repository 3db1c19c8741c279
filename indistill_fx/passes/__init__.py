"""The compiler's passes. `align` and `pipeline` combine them; `contract` defines what a pass is."""
