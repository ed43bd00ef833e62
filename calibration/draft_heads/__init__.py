"""Draft heads trained for an engine: text of its own, what its verifier says of it, and the training."""
