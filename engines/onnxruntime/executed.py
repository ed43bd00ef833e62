"""Which kernels a graph really runs, by node name: from ONNX Runtime's own profile of one pass."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from engines.contract import Contract
from engines.onnxruntime.session import OnnxRuntimeSession
from quasar.errors import EngineError

_INTEGER_MATMULS = {"MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "MatMulNBits"}


def executed_kernels(
    directory: Path, graph: Path, contract: Contract, *, exact_integers: bool = False
) -> dict[str, str]:
    """Node name → operator, after optimization, of every node that one pass of width 2 runs, for its logits."""
    with tempfile.TemporaryDirectory() as folder:
        session = OnnxRuntimeSession(
            directory, graph, contract, exact_integers=exact_integers, profile_prefix=Path(folder) / "profile"
        )
        # Cut-down graphs give logits alone.
        session.run_logits(np.zeros(2, np.int64), 0, 2)
        events = json.loads(session.end_profiling().read_text(encoding="utf-8"))
    kernels = {}
    for event in events:
        operator = event.get("args", {}).get("op_name")
        if operator and event.get("cat") == "Node":
            kernels[event["name"].removesuffix("_kernel_time")] = operator
    return kernels


def check_integer_matmuls(kernels: dict[str, str], linears: Iterable[str]) -> int:
    """The number of the named linears, all of which ran as integer matmuls.

    Raises `EngineError` naming an INT8 linear that ran in float: an unfused Q/DQ pair is correct, but slow.
    """
    expected = list(linears)
    for name in expected:
        operator = kernels.get(f"{name}.matmul", "nothing")
        if operator not in _INTEGER_MATMULS:
            raise EngineError(
                f"the INT8 linear {name} ran as {operator}, not as an integer matmul: this version of onnxruntime "
                "does not fuse its Q/DQ nodes; use the version in constraints.txt"
            )
    return len(expected)
