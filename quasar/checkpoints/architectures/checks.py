"""What is tested of a family, by name: `Architecture.tested` says which of these its tests are.

Each runs on random models of a few thousand parameters, with the family's options on. A test holds what families say
in step with what is run (tests/quasar/test_tested_families.py).
"""

from collections.abc import Mapping

FLOAT, STOCK, NATIVE, CUDA, TENSORRT, GGUF = "float", "stock", "native", "cuda", "tensorrt-rtx", "gguf"

CHECKS: Mapping[str, str] = {
    FLOAT: "logits in FP32 are transformers', from a folder, whole and in chunks",
    STOCK: "W8A8 on ONNX Runtime's kernels computes what the canonical graph says",
    NATIVE: "FP32 and W8A8 on native CPU kernels: the stock ones' logits, and the same bits in chunks and trees",
    CUDA: "W8A8 on the CUDA back end's kernels, interpreted in place of a GPU",
    TENSORRT: "TensorRT-RTX compiles the graph; run on no GPU",
    GGUF: "a GGUF file holds the model that transformers has",
}
