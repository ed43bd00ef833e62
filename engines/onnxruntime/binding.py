"""What is bound to an ONNX Runtime session: a value that is bound already is not bound again."""

from typing import Any

from numpy.typing import NDArray


class Binding:
    """An I/O binding. Values share their memory with arrays: what the arrays hold then is what a pass reads."""

    def __init__(self, session: Any) -> None:
        """Of an `onnxruntime.InferenceSession`; nothing is bound yet."""
        self._session = session
        self._binding = session.io_binding()
        self._bound: dict[str, Any] = {}
        # Output → its place among those that are bound.
        self._outputs: dict[str, int] = {}

    def input(self, name: str, value: Any) -> None:
        """Bind an OrtValue to an input; the one of the pass before costs nothing."""
        if self._bound.get(name) is not value:
            self._binding.bind_ortvalue_input(name, value)
            self._bound[name] = value

    def output(self, name: str, value: Any) -> None:
        """The same for an output."""
        if self._bound.get(name) is not value:
            self._binding.bind_ortvalue_output(name, value)
            self._outputs.setdefault(name, len(self._outputs))
            self._bound[name] = value

    def any_output(self, name: str) -> None:
        """Let the pass allocate an output whose shape is not known before (`allocated`)."""
        self._binding.bind_output(name)
        self._outputs.setdefault(name, len(self._outputs))
        self._bound.pop(name, None)

    def allocated(self, name: str) -> NDArray[Any]:
        """What the latest pass wrote there."""
        array: NDArray[Any] = self._binding.get_outputs()[self._outputs[name]].numpy()
        return array

    def run(self) -> None:
        """Make a pass with what is bound."""
        self._session.run_with_iobinding(self._binding)
