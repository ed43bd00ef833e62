"""The common ground: checkpoints, text, errors, atomic files and the frame of the command lines."""

__version__ = "0.1.0"
