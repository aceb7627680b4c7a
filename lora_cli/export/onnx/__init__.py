"""ONNX exports for onnxruntime."""
