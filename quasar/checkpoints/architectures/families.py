"""The families that can be built, by name: one line each."""

from quasar.checkpoints.architectures.base import Architecture
from quasar.checkpoints.architectures.gemma2 import GEMMA2
from quasar.checkpoints.architectures.gemma3 import GEMMA3
from quasar.checkpoints.architectures.granite import GRANITE
from quasar.checkpoints.architectures.internlm2 import INTERNLM2
from quasar.checkpoints.architectures.internlm3 import INTERNLM3
from quasar.checkpoints.architectures.llama import LLAMA
from quasar.checkpoints.architectures.mistral import MISTRAL
from quasar.checkpoints.architectures.olmo2 import OLMO2
from quasar.checkpoints.architectures.openpangu import OPENPANGU
from quasar.checkpoints.architectures.phi3 import PHI3
from quasar.checkpoints.architectures.qwen2 import QWEN2
from quasar.checkpoints.architectures.qwen3 import QWEN3
from quasar.checkpoints.architectures.seed_oss import SEED_OSS
from quasar.checkpoints.architectures.smollm3 import SMOLLM3

ARCHITECTURES: dict[str, Architecture] = {
    one.name: one
    for one in (
        LLAMA,
        QWEN2,
        QWEN3,
        MISTRAL,
        PHI3,
        GEMMA2,
        GEMMA3,
        SMOLLM3,
        GRANITE,
        OLMO2,
        OPENPANGU,
        INTERNLM2,
        INTERNLM3,
        SEED_OSS,
    )
}
