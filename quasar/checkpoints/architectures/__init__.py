"""Decoder families, one file each: how their configs are read, what they call their weights, what smoothing folds."""
