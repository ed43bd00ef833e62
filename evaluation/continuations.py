"""The float model's own answers to prompts: the text that a verifier of a faithful engine reads."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from calibration.texts import TokenizedText
from quasar.checkpoints import DecoderSpec

if TYPE_CHECKING:
    import torch

# Many prompts at once read the weights once; their KV cache stays below 1 GiB.
_MAX_BATCH = 64
_MAX_CACHE_BYTES = 1 << 30


def continue_prompts(
    model: "torch.nn.Module",
    spec: DecoderSpec,
    prompts: Sequence[tuple[int, ...]],
    *,
    num_tokens: int,
    stop_ids: Sequence[int],
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[TokenizedText]:
    """The float model's greedy continuation of each prompt, in batches of similar length, up to one of `stop_ids`."""
    import torch
    from transformers import GenerationConfig

    pad = stop_ids[0] if stop_ids else 0
    config = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=list(stop_ids) or None, pad_token_id=pad
    )
    texts: dict[int, TokenizedText] = {}
    for batch in _batches(spec, [len(prompt) + num_tokens for prompt in prompts]):
        longest = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        with torch.inference_mode():
            generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
        for row, index in enumerate(batch):
            new = generated[row, longest:].tolist()
            end = next((place + 1 for place, token in enumerate(new) if token in stop_ids), len(new))
            texts[index] = TokenizedText(prompt=prompts[index], continuation=tuple(new[:end]))
        on_batch(len(batch))
    return [texts[index] for index in range(len(prompts))]


def _batches(spec: DecoderSpec, lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences of similar length, as many at once as the bound on their KV cache allows."""
    position_bytes = sum(2 * layer.attention.kv_size * 4 for layer in spec.layers)
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        fits = _MAX_CACHE_BYTES // (position_bytes * lengths[index])
        if batches and len(batches[-1]) < min(_MAX_BATCH, fits):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
