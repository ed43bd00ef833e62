"""What the graph *is*: the canonical ONNX verifier, its passes, the lowering per back end, and the build."""
