"""The float reference: the transformers model of a checkpoint, filled by our own reader, one tensor at a time."""

import contextlib
import os
from typing import TYPE_CHECKING, Any

from calibration.fake_quantization import module_of
from quasar.checkpoints import Checkpoint, DecoderSpec
from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.checkpoints.checkpoint import check_finite
from quasar.checkpoints.rope import attention_scaling, inverse_frequencies
from quasar.errors import BuildError, CheckpointError

if TYPE_CHECKING:
    import torch


def load_float_model(checkpoint: Checkpoint) -> "torch.nn.Module":
    """A causal language model in evaluation mode, in float32 where memory allows, else in bfloat16.

    Raises `CheckpointError` if transformers' model has a parameter that the checkpoint does not fill, and
    `BuildError` if torch or transformers is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise BuildError(
            f"{error.name} is not installed; the float model needs it: run pip install 'quasar-verifier[build]'"
        ) from None
    logging.set_verbosity_error()
    dtype = torch.float32 if _fits_in_float32(checkpoint.spec) else torch.bfloat16
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(checkpoint.transformers_config(), trust_remote_code=False)
        _take_apart(model, checkpoint.spec)
    for name in checkpoint.spec.tensors():
        value = _to_torch(check_finite(checkpoint, name, checkpoint.read(name)), dtype)
        module, _, parameter = name.rpartition(".")
        setattr(module_of(model, module), parameter, torch.nn.Parameter(value, requires_grad=False))
    # Tables made at construction were made on "meta"; they follow from the config alone.
    rotary = type(model.model.rotary_emb)(model.config)
    ropes = checkpoint.spec.ropes
    if len(ropes) == 1 and ropes[0].kind == "divided":
        # One set of divisors for every length, as an engine has it: transformers would choose at each call.
        rotary.rope_type, rotary.attention_scaling = "default", attention_scaling(ropes[0])
        rotary.inv_freq = torch.from_numpy(inverse_frequencies(ropes[0], checkpoint.spec.head_size))
    model.model.rotary_emb = rotary
    if hasattr(model.model.embed_tokens, "embed_scale"):
        model.model.embed_tokens.embed_scale = torch.tensor(checkpoint.spec.embedding_scale)
    if checkpoint.spec.tied_head:
        model.lm_head.weight = model.model.embed_tokens.weight
    values = [*model.named_parameters(), *model.named_buffers()]
    unfilled = [name for name, value in values if value.is_meta]
    if unfilled:
        raise CheckpointError(f"{checkpoint.location}: the float model's {unfilled[0]!r} is not in the checkpoint")
    module_model: torch.nn.Module = model.eval()
    return module_model


def _take_apart(model: Any, spec: DecoderSpec) -> None:
    """Give every fused projection a submodule for each part, by the part's own name: then each has an input of its own.

    Transformers' own models stack the parts one below the other.
    """
    fused = ARCHITECTURES[model.config.model_type].fused
    if not fused:
        return
    from torch import cat, nn

    class Parts(nn.Module):
        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            return cat([part(x) for part in self.children()], dim=-1)

    for layer, layer_spec in zip(model.model.layers, spec.layers, strict=True):
        for stored in dict.fromkeys(one.stored for one in fused.values()):
            whole, parts = layer.get_submodule(stored), Parts()
            for module, one in fused.items():
                if one.stored == stored:
                    rows = len(one.rows(layer_spec))
                    part = nn.Linear(whole.in_features, rows, bias=whole.bias is not None)
                    parts.add_module(module.rpartition(".")[2], part)
            parent, _, name = stored.rpartition(".")
            setattr(layer.get_submodule(parent), name, parts)


def _fits_in_float32(spec: DecoderSpec) -> bool:
    """Whether float32 weights take at most 40 % of the machine's memory: an FP32 engine may be loaded beside them."""
    available = float("inf")
    with contextlib.suppress(AttributeError, ValueError, OSError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 4 * spec.num_parameters() <= 0.4 * available


def _to_torch(array: Any, dtype: "torch.dtype") -> "torch.Tensor":
    import numpy as np
    import torch

    if array.dtype.name == "bfloat16":
        # numpy's bfloat16 is an extension type that torch does not know; the bits are the same.
        tensor = torch.from_numpy(np.ascontiguousarray(array).view(np.uint16).copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    tensor = tensor.to(dtype)
    # torch's product of a few tokens with a matrix stored by columns is about four times as fast here.
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor
