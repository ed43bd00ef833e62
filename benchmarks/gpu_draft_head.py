"""A draft head on the GPU, as a step of benchmarks/gpu.py: what its steps take, and that they are right."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from gpu_device import Runner
from numpy.typing import NDArray
from random_engine import FILES

from calibration.draft_heads.prepared import PreparedDraftHead
from calibration.precisions.catalog import DEFAULT_HEAD_CHOICE, precisions_for
from engines.contract import Contract
from engines.cuda.draft_head import CudaDraftHead
from engines.cuda.program import Program
from engines.cuda.session import CudaSession
from engines.draft_head import DraftHeadFiles
from engines.onnxruntime.draft_head import OnnxRuntimeDraftHead
from engines.session import Positions
from export.add_head import write_head
from export.cuda_head_program import write_head_programs
from quasar.checkpoints.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, Rope
from quasar.draft_heads.folder import DraftHead
from quasar.draft_heads.spec import DraftHeadSpec
from quasar.draft_heads.writer import write_draft_head

_EMBEDDING = "embed_tokens.weight"
# Of the tokens that it drafts, at most.
_VOCABULARY = 16384


def write_random_head(spec: DecoderSpec, contract: Contract, folder: Path) -> DraftHeadFiles:
    """An EAGLE-3 head of random weights for the graphs of a folder, as `export add-head` writes it."""
    head = _spec_of(spec)
    random = np.random.default_rng(5)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, shape in head.tensors().items():
        values = random.standard_normal(shape, np.float32)
        near_one = (1 + values / 10).astype(np.float32)
        tensors[name] = near_one if len(shape) == 1 else values * np.float32(shape[-1] ** -0.5)
    targets = np.sort(random.choice(spec.vocab_size, head.draft_vocab_size, replace=False)).astype(np.int64)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        write_draft_head(Path(scratch), head, tensors, targets, base_model="random")
        prepared = PreparedDraftHead(
            head=DraftHead(Path(scratch), spec), precision=precisions_for(DEFAULT_HEAD_CHOICE)[0], target=None
        )
        table = ir.load(folder / FILES.native_graph).graph.initializers[_EMBEDDING].const_value
        assert isinstance(table, ir.ExternalTensor)
        return write_head(folder, contract, prepared, table, engine="random")


def _spec_of(spec: DecoderSpec) -> DraftHeadSpec:
    """A layer of the model's own sizes; features of an early, a middle and a late layer."""
    attention = spec.layers[0].attention
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_size=attention.head_size,
            rope=Rope(theta=1e4),
        ),
        mlp=MlpSpec(intermediate_size=spec.layers[0].mlp.intermediate_size),
    )
    features = sorted({max(1, share * spec.num_layers // 4) for share in (1, 2, 4)})
    return DraftHeadSpec(
        kind="eagle3",
        decoder=DecoderSpec(
            architecture="llama",
            layers=(layer,),
            hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
            context_length=spec.context_length,
            rms_norm_eps=1e-6,
        ),
        feature_layers=tuple(features),
        target_hidden_size=spec.hidden_size,
        draft_vocab_size=min(_VOCABULARY, spec.vocab_size // 2),
    )


def open_head(
    runner: Runner, program: Program, weights: Path, contract: Contract, files: DraftHeadFiles, folder: Path
) -> tuple[CudaSession, CudaDraftHead]:
    """The verifier's session with what the head reads, and the head's; `weights` holds the verifier's tensors."""
    programs = write_head_programs(folder, files, contract, program, weights)
    device = runner.device()
    kernels = runner.load(device, dict.fromkeys((*programs.verifier.variants(), *programs.head.variants())))
    session = CudaSession(programs.verifier, weights, kernels, device, contract)
    return session, CudaDraftHead(programs.head, weights, kernels, device, files, session)


def fed(head: CudaDraftHead | OnnxRuntimeDraftHead, lengths: Sequence[int]) -> NDArray[np.float32]:
    """Log-probabilities after a prompt and a tree of two, of one random sequence: float32 [rows, k]."""
    random, found = np.random.default_rng(6), []
    first = 0
    for length in lengths:
        tokens = random.integers(0, head.contract.vocab_size, length)
        states = random.standard_normal((length, head.hidden_size)).astype(np.float32)
        positions = Positions(tokens=tokens, cache_length=first, num_logits=1)
        found.append(head.run([positions], states).log_probabilities.copy())
        first += length
    tokens = random.integers(0, head.contract.vocab_size, 2)
    states = random.standard_normal((2, head.hidden_size)).astype(np.float32)
    tree = Positions(tokens=tokens, cache_length=first, num_logits=2, parents=np.array([-1, -1]))
    found.append(head.run([tree], states).log_probabilities.copy())
    return np.concatenate(found)


def step_of(head: CudaDraftHead, count: int, cached: int) -> Any:
    """A call that makes one step of so many siblings."""
    tokens = np.arange(count)
    states = np.zeros((count, head.hidden_size), np.float32)
    step = Positions(
        tokens=tokens,
        cache_length=cached,
        num_logits=count,
        parents=None if count == 1 else np.full(count, -1),
    )
    return lambda: head.run([step], states)
