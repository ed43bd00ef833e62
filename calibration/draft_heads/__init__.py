"""Draft heads: their weights as an engine has them, and training one for a verifier on text of its own."""
