"""What is *built and loaded*: the contract, the engine directory with its manifest, and the back ends' sessions."""

from engines.contract import Contract
from engines.cuda.load_options import CudaOptions
from engines.loaded import LoadedEngine
from engines.loading import load_engine
from engines.manifest import Manifest
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from engines.tensorrt.load_options import TensorRtOptions

__all__ = [
    "Contract",
    "CudaOptions",
    "LoadedEngine",
    "Manifest",
    "OnnxRuntimeOptions",
    "TensorRtOptions",
    "load_engine",
]
