"""Calibration text: the shipped sets, overlap, continuations in batches."""

import numpy as np
import pytest
import torch

from calibration.float_model import load_float_model
from calibration.texts import continue_prompts, default_prompts, fingerprint, refuse_overlap
from quasar.checkpoints import open_checkpoint
from quasar.errors import BuildError
from quasar.text import Prompt
from tests.tiny import save_tiny_model


def prompt(text):
    return Prompt(messages=({"role": "user", "content": text},))


def test_shipped_sets_are_disjoint_and_varied():
    calibration, evaluation = default_prompts("calibration"), default_prompts("evaluation")
    refuse_overlap(calibration, evaluation, "the evaluation prompts")
    assert len({item.category for item in calibration}) >= 10
    assert len({fingerprint(item) for item in calibration}) == len(calibration) >= 50
    assert any(ord(character) > 0x3000 for item in calibration for character in item.text)


def test_overlap_is_found_whatever_the_case_and_spacing():
    evaluation = [prompt("Why do  leaves change\ntheir colour in autumn, and what are the pigments called?")]
    for text in (
        "why do leaves change their colour in autumn, AND what are the pigments called?",
        "Here is a question. Why do leaves change their colour in autumn, and what are the pigments called? Thanks.",
        "leaves change their colour in autumn, and what are the pigments",
    ):
        with pytest.raises(BuildError, match="calibration prompt 1"):
            refuse_overlap([prompt(text)], evaluation, "x")
    refuse_overlap([prompt("leaves")], evaluation, "x")


def test_batched_continuations_are_those_of_single_prompts(tmp_path):
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path, "llama")))
    model = load_float_model(checkpoint)
    random = np.random.default_rng(1)
    prompts = [tuple(random.integers(0, 250, length).tolist()) for length in (3, 30, 11)]
    together = continue_prompts(model, checkpoint.spec, prompts, num_tokens=12, stop_ids=checkpoint.spec.eos_token_ids)
    for tokens, text in zip(prompts, together, strict=True):
        assert text.prompt == tokens
        expected = list(tokens)
        for _ in range(12):
            with torch.inference_mode():
                expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
            if expected[-1] in checkpoint.spec.eos_token_ids:
                break
        assert list(text.tokens) == expected
