"""What each file of an engine directory is for, in a few words (docs/engine-directory.md has more)."""

from fnmatch import fnmatchcase

# The first pattern that a path matches says it.
_PURPOSES = {
    "verifier.onnx": "the portable graph, which back ends are compiled from",
    "verifier.onnx.data": "its weights, which the stock graph and TensorRT's read as well",
    "onnxruntime/verifier.onnx": "CPU, stock kernels",
    "onnxruntime/verifier.onnx.data": "CPU, stock kernels: weights in blocks",
    "onnxruntime/probe.onnx": "CPU, stock kernels: probes of row invariance",
    "onnxruntime/native.onnx": "CPU, native kernels",
    "onnxruntime/native.onnx.shared.data": "CPU, native kernels: embedding, norms, tables, float weights",
    "onnxruntime/native.onnx.data": "CPU, native kernels: INT8 weights, packed",
    "onnxruntime/native_draft.onnx": "CPU, native kernels: the same weights in a faster graph, for drafts",
    "onnxruntime/native_probe.onnx": "CPU, native kernels: probes of row invariance",
    "onnxruntime/integer_check.onnx": "CPU: whether its integer kernels saturate",
    "cuda/program-with-head-*.json": "CUDA: the steps of a pass that tells what a draft head reads",
    "cuda/program-*.json": "CUDA: the steps of a pass",
    "cuda/draft-head-*.json": "CUDA: the steps of a draft head",
    "cuda/weights-*.bin": "CUDA: weights, packed",
    "cuda/kernels-*.zip": "CUDA: compiled kernels",
    "tensorrt/*.plan": "TensorRT: a compiled plan",
    "tensorrt/*.onnx.data": "TensorRT: INT8 weights in tiles",
    "tensorrt/*.onnx": "TensorRT: the graph that plans are compiled from",
    "tensorrt/kv_compact-*.cubin": "TensorRT: the kernel that keeps a tree path's positions",
    "draft_head/*.onnx": "CPU, native kernels: a draft head",
    "draft_head/*.data": "CPU, native kernels: a draft head's weights",
    "tokenizer.json": "text to tokens and back",
    "chat_template*.jinja": "conversations to text",
    "calibration.json": "what calibration chose and lost, linear by linear",
    "successors*": "likeliest next tokens, for drafting",
}


def purpose(path: str) -> str:
    """What a file is for, by its path in the directory; of a back end that is not known here, only that."""
    found = (words for pattern, words in _PURPOSES.items() if fnmatchcase(path, pattern))
    folder, slash, _ = path.partition("/")
    return next(found, f"{folder}: a back end's own" if slash else "")
