"""Operators for ONNX Runtime on a CPU: C++, packed weights, one instruction level chosen when they are loaded."""
