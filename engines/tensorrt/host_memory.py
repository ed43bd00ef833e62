"""Host memory in place of TensorRT: what a session and its bindings do, on any machine.

`HostEngine` has that part of TensorRT's engine and execution context which the session uses, on a `HostDevice`. It
runs the graph that TensorRT is given through ONNX Runtime, on plain buffers by address, and refuses what TensorRT
refuses, in the same words. A float32 build of it (`LowerToTensorRt(…, "float32")`) is the exact one; of a float16
graph, ONNX Runtime rounds what passes between operators and computes inside them in float32. What cannot be seen here
is speed, and TensorRT's own kernels.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from engines import contract as names
from engines.contract import Contract
from engines.gpu.host_device import HostDevice, host_array
from engines.onnxruntime.session_options import session_options
from engines.tensorrt.network import past_of, profiles_for
from engines.tensorrt.session import LoadedPlan

_ONNX_TYPES = {
    "tensor(int64)": "INT64",
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(bool)": "BOOL",
}
_NUMPY_TYPES = {
    "INT64": np.dtype(np.int64),
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BOOL": np.dtype(np.bool_),
}


def host_plan(
    graph: Path, data_folder: Path, contract: Contract, device: HostDevice, *, threads: int = 0
) -> LoadedPlan:
    """A graph lowered for TensorRT as a plan that runs on `device`."""
    engine = HostEngine(graph, data_folder, contract, device, threads=threads)
    return LoadedPlan(
        engine=engine,
        context_argument="USER_MANAGED",
        plan_bytes=graph.stat().st_size,
        last_error=lambda: engine.errors[-1] if engine.errors else "",
    )


class HostEngine:
    """The part of `tensorrt.ICudaEngine` that a session uses."""

    device_memory_size_v2 = 1 << 16

    def __init__(
        self, graph: Path, data_folder: Path, contract: Contract, device: HostDevice, *, threads: int = 0
    ) -> None:
        import onnxruntime as ort

        options = session_options(threads=threads, exact_integers=False)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(data_folder.resolve())
        )
        self.session = ort.InferenceSession(graph.read_bytes(), options, providers=["CPUExecutionProvider"])
        self.device = device
        self.errors: list[str] = []
        self.profiles = list(profiles_for(contract).values())
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self._names: list[str] = [*self.inputs, *self.outputs]

    @property
    def num_io_tensors(self) -> int:
        """Inputs and outputs."""
        return len(self._names)

    @property
    def num_optimization_profiles(self) -> int:
        """Verify and prefill."""
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        """A tensor's name."""
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        """A tensor's type; `name` of it is TensorRT's."""
        value = self.inputs.get(name) or self.outputs[name]
        return SimpleNamespace(name=_ONNX_TYPES[value.type])

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        """Smallest, typical and largest shape of an input."""
        return self.profiles[profile][name]

    def get_aliased_input_tensor(self, name: str) -> str:
        """The input that an output overwrites, or an empty string."""
        return past_of(name) or ""

    def create_execution_context(self, strategy: Any) -> "HostContext":  # noqa: ARG002 - there is no scratch memory
        """A new context."""
        return HostContext(self)


class HostContext:
    """The part of `tensorrt.IExecutionContext` that a session uses."""

    def __init__(self, engine: HostEngine) -> None:
        self._engine = engine
        self._profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:  # noqa: ARG002 - nothing to wait for
        """Choose a profile; shapes set before are forgotten. Raises for an unknown one, where the others return."""
        if not 0 <= index < len(self._engine.profiles):
            self._refuse(
                "setOptimizationProfileAsync", f"profileIndex {index} is not in [0, {len(self._engine.profiles)})"
            )
            raise RuntimeError("Error in set optimization profile async.")
        self._profile, self._shapes = index, {}
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        """Scratch memory."""

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Where a tensor lies."""
        if name not in self._engine.inputs and name not in self._engine.outputs:
            return self._refuse("setTensorAddress", f"Given invalid tensor name: {name}")
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """The shape of an input in the next pass."""
        if name not in self._engine.inputs:
            return self._refuse("setInputShape", f"Given invalid tensor name: {name}")
        smallest, _, largest = self._engine.profiles[self._profile][name]
        fits = len(shape) == len(smallest) and all(
            low <= extent <= high for low, extent, high in zip(smallest, shape, largest, strict=True)
        )
        if not fits:
            return self._refuse(
                "setInputShape",
                f"condition: satisfyProfile. Set dimension {list(shape)} for tensor {name} does not satisfy any "
                f"optimization profiles. Valid range for profile {self._profile}: {list(smallest)}..{list(largest)}.",
            )
        self._shapes[name] = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Run a pass, or record it."""
        if stream != self._engine.device.stream:
            return self._refuse("enqueueV3", "condition: stream. The stream is unknown")
        for name in self._engine.inputs:
            if name not in self._shapes:
                return self._refuse("enqueueV3", f"condition: allInputDimensionsSpecified. {name} has no shape")
            if name not in self._addresses:
                return self._refuse(
                    "enqueueV3",
                    f"Address is not set for input tensor {name}. Call setInputTensorAddress or setTensorAddress "
                    "before enqueue/execute.",
                )
        for name in self._engine.outputs:
            if name not in self._addresses:
                return self._refuse(
                    "enqueueV3",
                    f"Neither address or allocator is set for output tensor {name}. Call setOutputTensorAddress, "
                    "setTensorAddress or setOutputAllocator before enqueue/execute.",
                )
            past = past_of(name)
            if past is not None and self._addresses[past] != self._addresses[name]:
                return self._refuse("enqueueV3", f"{name} must have the address of the tensor {past} that it aliases")
        self._engine.device.enqueue(self._pass(dict(self._shapes)))
        return True

    def _pass(self, shapes: dict[str, tuple[int, ...]]) -> Callable[[], None]:
        import onnxruntime as ort

        engine, addresses = self._engine, dict(self._addresses)
        asked_for = shapes[names.LOGITS_ROWS][0]
        batch = shapes[names.INPUT_IDS][0]
        binding = engine.session.io_binding()
        for name, shape in shapes.items():
            binding.bind_ortvalue_input(name, self._value(ort, name, addresses[name], shape))
        for name in engine.outputs:
            past = past_of(name)
            if past is not None:
                shape = shapes[past]
            else:
                shape = (
                    (batch, asked_for)
                    if name == names.NEXT_TOKENS
                    else (batch, asked_for, engine.outputs[name].shape[-1])
                )
            binding.bind_ortvalue_output(name, self._value(ort, name, addresses[name], shape))
        return lambda: engine.session.run_with_iobinding(binding)

    def _value(self, ort: Any, name: str, address: int, shape: tuple[int, ...]) -> Any:
        kind = _NUMPY_TYPES[self._engine.get_tensor_dtype(name).name]
        return ort.OrtValue.ortvalue_from_numpy(host_array(address, shape, kind))

    def _refuse(self, function: str, why: str) -> bool:
        self._engine.errors.append(
            f"IExecutionContext::{function}: Error Code 3: API Usage Error (Parameter check failed, {why})"
        )
        return False
