"""The float reference: the transformers model of a checkpoint, filled by our own reader, one tensor at a time."""

import contextlib
import os
from typing import TYPE_CHECKING, Any

from calibration.fake_quantization import module_of
from quasar.checkpoints import Checkpoint, DecoderSpec
from quasar.checkpoints.checkpoint import check_finite
from quasar.checkpoints.rope import inverse_frequencies
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
    for name in checkpoint.spec.tensors():
        value = _to_torch(check_finite(checkpoint, name, checkpoint.read(name)), dtype)
        module, _, parameter = name.rpartition(".")
        setattr(module_of(model, module), parameter, torch.nn.Parameter(value, requires_grad=False))
    # Tables made at construction were made on "meta"; they follow from the config alone.
    rotary = type(model.model.rotary_emb)(model.config)
    if checkpoint.spec.rope.kind == "divided":
        rotary.inv_freq = torch.from_numpy(inverse_frequencies(checkpoint.spec.rope, checkpoint.spec.head_size))
    model.model.rotary_emb = rotary
    if checkpoint.spec.tied_head:
        model.lm_head.weight = model.model.embed_tokens.weight
    unfilled = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unfilled:
        raise CheckpointError(f"{checkpoint.location}: the float model's {unfilled[0]!r} is not in the checkpoint")
    module_model: torch.nn.Module = model.eval()
    return module_model


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
