"""The compiler's passes. `align` and `pipeline` put them together; what a pass is stands in `contract`."""
