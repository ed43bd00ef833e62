"""Weights that a checkpoint already holds as integers: GGUF's blocks, compressed-tensors, GPTQ and AWQ."""
