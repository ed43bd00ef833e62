"""ONNX Runtime: the session, and which kernels it runs."""
