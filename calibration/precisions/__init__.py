"""Precisions: one object each, in a file of its own, and a line in `registry`."""
