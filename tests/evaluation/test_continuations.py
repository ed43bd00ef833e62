"""The float model's own answers, in batches."""

import numpy as np
import torch

from calibration.float_model import load_float_model
from evaluation.continuations import continue_prompts
from quasar.checkpoints import open_checkpoint
from tests.tiny import save_tiny_model


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
