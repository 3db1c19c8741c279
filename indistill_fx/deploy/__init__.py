"""Verified ONNX files: export, check, quantise, measure."""
