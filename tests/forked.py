"""Processes that are forked from a server which has imported the heavy libraries: seconds are paid once a worker."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess

import pytest

from tests.few_rounds import take_few_rounds

_HEAVY = [
    *("torch", "transformers", "transformers.models.llama.modeling_llama", "onnx", "onnx_ir", "onnxruntime"),
    *("calibration.float_model", "export.build", "export.cli", "evaluation.cli_fidelity", "runtime.cli"),
]


def forked(target: Callable[..., object], *arguments: object) -> ForkServerProcess:
    """A process that is about to call `target` (a function that can be pickled), and takes few rounds as well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_HEAVY)
    return context.Process(target=_call, args=(target, arguments))


def _call(target: Callable[..., object], arguments: tuple[object, ...]) -> None:
    take_few_rounds(pytest.MonkeyPatch())
    target(*arguments)
