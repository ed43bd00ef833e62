"""A lowered graph in real float16: every operator on numpy arrays of the graph's own types.

ONNX Runtime's CPU kernels would compute in float32 between casts and hide what overflows. Matmuls and attention's
products sum in float32 and round once, as tensor cores do.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from plugins.integer_linear import integer_linear as linear_reference
from plugins.quantize_per_token import quantize_per_token as reference


class MatMul(OpRun):
    def _run(self, a, b):
        return (np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype),)


class Attention(OpRun):
    """Grouped-query attention with an additive mask: scores, softmax and sums in float32, the result rounded once.

    As in TensorRT, queries and keys are first multiplied by the root of the scale, in their own type.
    """

    def _run(self, q, k, v, mask, scale=None, **attributes):
        root = np.sqrt(np.float32(q.shape[-1] ** -0.5 if scale is None else scale)).astype(q.dtype)
        q, k = q * root, k * root
        repeat = q.shape[1] // k.shape[1]
        keys, values = (np.repeat(part.astype(np.float32), repeat, axis=1) for part in (k, v))
        scores = q.astype(np.float32) @ keys.swapaxes(-1, -2) + mask
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return ((weights @ values).astype(q.dtype),)


class quantize_per_token(OpRun):  # noqa: N801 - the operator's name
    """The plugin's reference."""

    op_domain = "quasar"

    def _run(self, x, **attributes):
        q, a = reference(x)
        return q, a[..., None]


class integer_linear(OpRun):  # noqa: N801 - the operator's name
    """The plugin's reference."""

    op_domain = "quasar"

    def _run(self, q, a, weight, scale, bias, **attributes):
        return (linear_reference(q, a, weight, scale, bias),)


def run_every_operator(graph: Path, data_folder: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Value → array of every node's output."""
    model = onnx.load(graph, load_external_data=False)
    load_external_data_for_model(model, str(data_folder))
    evaluator = ReferenceEvaluator(model, new_ops=[MatMul, Attention, quantize_per_token, integer_linear])
    values = evaluator.run(None, feeds, intermediate=True)
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
