"""Random draft heads for tiny models, and engines that have one."""

import shutil
from pathlib import Path

import numpy as np

from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, Rope
from quasar.draft_heads.spec import DraftHeadSpec
from quasar.draft_heads.writer import write_draft_head


def head_spec(target: DecoderSpec, kind="eagle3", *, draft_vocab_size=None, attention=None, **options) -> DraftHeadSpec:
    """A head of another shape than the target's layers: two query heads of 16 on one for keys.

    `attention`: further options of it.
    """
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=2, num_kv_heads=1, head_size=16, rope=Rope(theta=10_000.0), **(attention or {})
        ),
        mlp=MlpSpec(intermediate_size=96),
    )
    decoder = DecoderSpec(
        architecture="llama",
        layers=(layer,),
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        context_length=target.context_length,
        rms_norm_eps=1e-5,
    )
    layers = (1, target.num_layers) if kind == "eagle3" else (target.num_layers,)
    return DraftHeadSpec(
        kind=kind,
        decoder=decoder,
        feature_layers=options.pop("feature_layers", layers),
        target_hidden_size=target.hidden_size,
        draft_vocab_size=draft_vocab_size or (target.vocab_size // 2 if kind == "eagle3" else target.vocab_size),
        normed=kind == "eagle",
        own_head=kind == "eagle3",
        **options,
    )


def random_tensors(spec: DraftHeadSpec, seed=0) -> dict[str, np.ndarray]:
    """By canonical name, of a size that keeps activations near 1."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in spec.tensors().items():
        values = random.standard_normal(shape).astype(np.float32)
        tensors[name] = 1 + 0.1 * values if len(shape) == 1 and "norm" in name else values / np.sqrt(shape[-1])
    return tensors


def random_targets(spec: DraftHeadSpec, seed=0) -> np.ndarray:
    """Which of the target's tokens it drafts: int64, ascending."""
    random = np.random.default_rng(seed)
    return np.sort(random.choice(spec.decoder.vocab_size, spec.draft_vocab_size, replace=False)).astype(np.int64)


def write_random_head(folder: Path, model: Path, kind="eagle3", **options) -> DraftHeadSpec:
    """Write a random head for a model's folder."""
    spec = head_spec(open_checkpoint(str(model)).spec, kind, **options)
    folder.mkdir(parents=True, exist_ok=True)
    write_draft_head(folder, spec, random_tensors(spec), random_targets(spec), base_model="tiny")
    return spec


def copy_engine(engine: Path, folder: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(engine, folder))
