"""The canonical graph is valid ONNX: checked by onnx itself, shapes inferred strictly."""

from pathlib import Path

from quasar.errors import BuildError


def check_model(path: Path) -> None:
    """Run `onnx.checker` with full shape inference on a saved model; raises `BuildError` with its first complaint."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"{path} is not a valid ONNX graph: {str(error).splitlines()[0]}") from None
