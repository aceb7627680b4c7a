"""ONNX export for onnxruntime."""
