"""ONNX with proof: export, check, quantise, measure."""
