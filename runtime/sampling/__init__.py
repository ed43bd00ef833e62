"""From a row of logits to a token: what options do to logits, the draw, and log-probabilities."""
