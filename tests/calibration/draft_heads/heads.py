"""Tiny heads and random text for them."""

import numpy as np

from calibration.draft_heads.data_folder import ANSWER, GIVEN, GeneratedSequence
from calibration.draft_heads.head_model import HeadModel
from calibration.draft_heads.linear_guess import InputScales, TargetParts
from quasar.checkpoints.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, Rope
from quasar.draft_heads.spec import DraftHeadSpec

HIDDEN, VOCABULARY, DRAFTED = 32, 96, 40
_TARGET = ((VOCABULARY, HIDDEN), (HIDDEN,))
# Any will do: the head is the same.
SCALES = InputScales(hidden=np.random.default_rng(6).uniform(0.5, 3, HIDDEN).astype(np.float32), embedding=0.7)


def tiny_spec(**changes):
    attention = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, rope=Rope(theta=100.0))
    decoder = DecoderSpec(
        architecture="llama",
        layers=(LayerSpec(attention=attention, mlp=MlpSpec(intermediate_size=48)),),
        hidden_size=HIDDEN,
        vocab_size=VOCABULARY,
        context_length=512,
        rms_norm_eps=1e-5,
    )
    values = {
        "kind": "eagle",
        "decoder": decoder,
        "feature_layers": (2,),
        "target_hidden_size": HIDDEN,
        "draft_vocab_size": DRAFTED,
        "normed": True,
        "fuse_bias": True,
        **changes,
    }
    return DraftHeadSpec(**values)


def random_tensors(spec, seed=0):
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        for name, shape in spec.tensors().items()
    }


def target_parts(seed=1):
    import torch

    random = np.random.default_rng(seed)
    embedding, norm = (torch.from_numpy(random.standard_normal(shape).astype(np.float32)) for shape in _TARGET)
    return TargetParts(embedding=embedding, norm=norm, eps=1e-5)


def tiny_model(spec, tensors):
    """A model, and its target's parts."""
    target = target_parts()
    return HeadModel(spec, tensors, target, SCALES, num_positions=128), target


def drafted_tokens(seed=2):
    return np.sort(np.random.default_rng(seed).permutation(VOCABULARY)[:DRAFTED])


def random_sequence(number, length, *, given=3, seed=3, greedy=None):
    """The next token is likely to be the one above it: a head can learn that."""
    random = np.random.default_rng([seed, number])
    tokens = (random.integers(VOCABULARY) + np.arange(length + 1)) % VOCABULARY
    likely = np.zeros((length, 32), np.int32)
    log_probabilities = np.full((length, 32), -np.inf, np.float16)
    for position in range(given - 1, length):
        others = random.permutation(VOCABULARY)[:31]
        likely[position] = [tokens[position + 1], *others]
        log_probabilities[position] = [np.log(0.69), *[np.log(0.01)] * 31]
    return GeneratedSequence(
        number=number,
        greedy=number % 2 == 0 if greedy is None else greedy,
        tokens=tokens[:length].astype(np.int32),
        kinds=np.array([GIVEN] * given + [ANSWER] * (length - given), np.int8),
        features=random.standard_normal((length, HIDDEN)).astype(np.float16),
        likely=likely,
        log_probabilities=log_probabilities,
    )
