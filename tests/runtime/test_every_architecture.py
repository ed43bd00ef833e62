"""Every architecture's W8A8 engine: speculative answers are the plain ones, and answers together are those alone."""

import numpy as np
import pytest

import runtime
from evaluation.concurrency import run_clients
from tests.export.test_architectures import MODELS
from tests.tiny import VOCABULARY, save_tiny_model

# Prompts of 3 to 400 tokens; what repeats is drafted by lookup.
LENGTHS = (3, 7, 20, 33, 64, 130, 257, 400)
# A chain, and what drafts trees where they are exact.
DRAFTERS = ({"drafter": "prompt-lookup", "num_draft_tokens": 5}, {"drafter": "recycling", "num_draft_tokens": 12})
SAMPLE = ("llama", "gemma2")


def prompts():
    random = np.random.default_rng(5)
    found = []
    for length in LENGTHS:
        part = random.integers(20, VOCABULARY, -(-length // 3))
        found.append(np.tile(part, 3)[:length].tolist())
    return found


def answers(engine, **options):
    return [engine.generate(prompt, max_new_tokens=24, ignore_eos=True, **options).token_ids for prompt in prompts()]


def together(engine, **options):
    found = {}

    def ask(place):
        answer = engine.generate(prompts()[place], max_new_tokens=24, ignore_eos=True, **options)
        found[place] = answer.token_ids

    run_clients(len(LENGTHS), len(LENGTHS), ask)
    return [found[place] for place in range(len(LENGTHS))]


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.full) for name in MODELS]
)
def test_answers_are_exact(name, build_engine, tmp_path):
    architecture, overrides = MODELS[name]
    engine_folder = build_engine(save_tiny_model(tmp_path / "model", architecture, **overrides), precision="w8a8")
    for threads in (1, 2):
        with runtime.load(engine_folder, kernels="native", threads=threads) as engine:
            assert engine.record.row_invariance.batch
            assert engine.record.row_invariance.tree
            plain = answers(engine, drafter="none")
            for drafting in DRAFTERS:
                assert answers(engine, **drafting) == plain
            assert together(engine) == plain
            assert max(engine.metrics().sequences_per_pass) > 1
            drawn = answers(engine, drafter="none", temperature=0.8, seed=3)
            assert together(engine, temperature=0.8, seed=3) == drawn
    with runtime.load(engine_folder, kernels="stock") as engine:
        plain = answers(engine, drafter="none")
        if engine.record.row_invariance.chain is not None:
            for drafting in DRAFTERS:
                assert answers(engine, **drafting) == plain
        assert together(engine) == plain
