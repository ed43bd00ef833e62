"""Calls of functions: what a request offers, the grammar that makes a call, and how calls are read from answers."""
