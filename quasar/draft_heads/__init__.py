"""Draft heads: what one is, and how published checkpoints are read."""
