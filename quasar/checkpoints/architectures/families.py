"""The families that can be built, by name: one line each."""

from quasar.checkpoints.architectures.base import Architecture
from quasar.checkpoints.architectures.llama import LLAMA
from quasar.checkpoints.architectures.qwen2 import QWEN2
from quasar.checkpoints.architectures.qwen3 import QWEN3

ARCHITECTURES: dict[str, Architecture] = {
    LLAMA.name: LLAMA,
    QWEN2.name: QWEN2,
    QWEN3.name: QWEN3,
}
