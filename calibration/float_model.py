"""The float reference: the transformers model of a checkpoint, filled by our own reader, one tensor at a time."""

import contextlib
import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from calibration.fake_quantization import module_of
from quasar.checkpoints import Checkpoint, DecoderSpec
from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.checkpoints.checkpoint import check_finite
from quasar.checkpoints.rope import attention_scaling, inverse_frequencies
from quasar.errors import BuildError, CheckpointError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("quasar.calibration")


def load_float_model(checkpoint: Checkpoint) -> "torch.nn.Module":
    """A causal language model in evaluation mode, in float32 where memory allows, else in bfloat16, which it warns of.

    Raises `CheckpointError` if transformers' model has a parameter that the checkpoint does not fill, and
    `BuildError` if torch or transformers is not installed.
    """
    model = empty_float_model(checkpoint)
    import torch

    dtype = torch.float32
    if not _fits_in_float32(checkpoint.spec):
        dtype = torch.bfloat16
        _log.warning(
            "%s takes more than 40 %% of this machine's memory in float32: the float model runs in bfloat16, whose "
            "rounding is in the figures of what is compared with it",
            checkpoint.location,
        )
    fill(model, checkpoint, checkpoint.spec.tensors(), dtype, by_columns=True)
    if checkpoint.spec.tied_head:
        model.lm_head.weight = model.model.embed_tokens.weight
    check_filled(checkpoint, model)
    module_model: torch.nn.Module = model
    return module_model


def empty_float_model(checkpoint: Checkpoint) -> Any:
    """Transformers' model in evaluation mode, without weights: its parameters are on torch's "meta" device.

    Raises `BuildError` if torch or transformers is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise BuildError(
            f"{error.name} is not installed; the float model needs it: run pip install 'quasar-verifier[build]'"
        ) from None
    transformers_logging.set_verbosity_error()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(checkpoint.transformers_config(), trust_remote_code=False)
        _take_apart(model, checkpoint.spec)
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
    return model.eval()


def fill(
    model: Any, checkpoint: Checkpoint, names: Iterable[str], dtype: "torch.dtype", *, by_columns: bool = False
) -> None:
    """Give parameters of an empty model, by canonical name, the checkpoint's values.

    `by_columns`: how matrices lie in memory; torch's product of a few tokens is about four times as fast then.
    """
    import torch

    for name in names:
        value = to_torch(check_finite(checkpoint, name, checkpoint.read(name))).to(dtype)
        if by_columns and value.ndim == 2:
            value = value.t().contiguous().t()
        module, _, parameter = name.rpartition(".")
        setattr(module_of(model, module), parameter, torch.nn.Parameter(value, requires_grad=False))


def check_filled(checkpoint: Checkpoint, module: Any) -> None:
    """Raise `CheckpointError` naming a parameter or buffer of a module that has no values."""
    unfilled = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    if unfilled:
        raise CheckpointError(f"{checkpoint.location}: the float model's {unfilled[0]!r} is not in the checkpoint")


def to_torch(array: Any) -> "torch.Tensor":
    """An array as a tensor, bfloat16 too, without a copy where torch can read it in place."""
    import numpy as np
    import torch

    contiguous = np.ascontiguousarray(array)
    if not contiguous.flags.writeable:
        contiguous = contiguous.copy()
    if contiguous.dtype.name == "bfloat16":
        # numpy's bfloat16 is an extension type that torch does not know; the bits are the same.
        return torch.from_numpy(contiguous.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(contiguous)


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
