"""From an ONNX file to a torch.fx graph by a table of operators, compared with onnxruntime; or to a module that onnxruntime runs."""
