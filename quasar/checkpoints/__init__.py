"""What a decoder *is*: its spec, and its weights by canonical name, from safetensors or GGUF."""

from quasar.checkpoints.checkpoint import Checkpoint
from quasar.checkpoints.sources import open_checkpoint
from quasar.checkpoints.spec import DecoderSpec, Rope

__all__ = ["Checkpoint", "DecoderSpec", "Rope", "open_checkpoint"]
