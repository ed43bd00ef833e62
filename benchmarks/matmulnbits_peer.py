"""Fidelity of ONNX Runtime's own 4-bit quantization beside engines of the same model, on the same texts.

    python -m export build smollm2 -o build/fp32 --precision fp32 --kernels native
    python benchmarks/matmulnbits_peer.py build/fp32 build/w4a8 build/w4a16

`MatMulNBitsQuantizer` rounds every linear of the first engine's graph, the LM head's too, in blocks of 32, as
`--algorithms` say: `rtn` symmetric, `rtn-offset` with zero points, `k-quant` as llama.cpp's K quants search ranges,
`hqq`. Accuracy level 4 rounds activations to INT8 in blocks; level 1 leaves them floats. Texts are those of a build's
own fidelity figures: the project's evaluation prompts and their answers. The last line is JSON.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from calibration.engine_logits import engine_logits
from calibration.fidelity import compare_several, torch_logits
from calibration.float_model import load_float_model
from calibration.texts import (
    EVALUATION_ANSWER_TOKENS,
    MAX_PROMPT_TOKENS,
    TokenizedText,
    default_prompts,
    tokenize,
)
from engines import OnnxRuntimeOptions, load_engine
from engines.directory import open_directory
from engines.onnxruntime.session import OnnxRuntimeSession
from engines.session import Session
from engines.text import open_codec
from plugins.cpu import toolchain
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.checkpoint import at_length

if TYPE_CHECKING:
    import torch

BLOCK = 32
ALGORITHMS = ("rtn", "rtn-offset", "k-quant", "hqq")
GRAPH = "onnxruntime/native.onnx"


def float_graph(directory: Path) -> onnx.ModelProto:
    """The FP32 engine's graph with its weights inside, and with an LM head that can be rounded."""
    model = ir.load(directory / GRAPH)
    ir.external_data.set_base_dir(model.graph, directory)
    graph = model.graph
    for node in list(graph):
        table = node.inputs[0]
        if node.op_type == "Transpose" and table is not None and table.const_value is not None:
            [columns] = node.outputs
            weight = ir.Value(name="lm_head.weight", const_value=ir.tensor(table.const_value.numpy().T.copy()))
            graph.register_initializer(weight)
            columns.replace_all_uses_with(weight)
            graph.remove(node, safe=True)
    ir.external_data.load_to_model(model)
    return ir.to_proto(model)


def quantize(directory: Path, algorithm: str, accuracy_level: int, folder: Path) -> Path:
    """Write the rounded graph into `folder`, which is made."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    nbits.logger.setLevel("WARNING")
    if algorithm == "k-quant":
        config = nbits.KQuantWeightOnlyQuantConfig()
    elif algorithm == "hqq":
        config = nbits.HQQWeightOnlyQuantConfig(block_size=BLOCK, bits=4)
    else:
        config = None
    quantizer = nbits.MatMulNBitsQuantizer(
        float_graph(directory),
        block_size=BLOCK,
        is_symmetric=algorithm == "rtn",
        accuracy_level=accuracy_level,
        algo_config=config,
    )
    quantizer.process()
    folder.mkdir()
    path = folder / "graph.onnx"
    quantizer.model.save_model_to_file(str(path), True)
    return path


def main() -> None:
    """Quantize, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float_engine", type=Path)
    parser.add_argument("engines", type=Path, nargs="*")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--accuracy-levels", type=int, nargs="+", default=[4])
    options = parser.parse_args()
    directory = open_directory(options.float_engine)
    contract = directory.manifest.contract
    texts = tokenize(
        default_prompts("evaluation"),
        open_codec(directory.path, directory.manifest.text),
        prompt_tokens=MAX_PROMPT_TOKENS,
        answer_tokens=EVALUATION_ANSWER_TOKENS,
    )
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        # Before the float model is there: rounding a graph needs as much memory again.
        graphs = {
            f"MatMulNBits {algorithm}, level {level}": quantize(
                options.float_engine, algorithm, level, Path(temporary) / f"{algorithm}-{level}"
            )
            for algorithm in options.algorithms
            for level in options.accuracy_levels
        }
        checkpoint = open_checkpoint(str(directory.manifest.model["source"]))
        model = load_float_model(at_length(checkpoint, contract.max_length))
        print(f"{'weights':36s} KL, prompts / answers   top-1, prompts / answers")
        for name, graph in graphs.items():
            session = OnnxRuntimeSession(graph.parent, graph, contract, library=toolchain.LIBRARY)
            found[name] = measure(name, model, texts, session)
    for other in options.engines:
        loaded = load_engine(other, options=OnnxRuntimeOptions(kernels="native"))
        found[other.name] = measure(other.name, model, texts, loaded.session)
    print(json.dumps(found))


def measure(name: str, model: "torch.nn.Module", texts: Sequence[TokenizedText], session: Session) -> dict[str, Any]:
    """Its figures; prints them, and closes the session."""
    [compared] = compare_several(texts, torch_logits(model), [engine_logits(session)])
    session.close()
    figures = compared.figures()
    answers = figures["continuation"]
    print(
        f"{name:36s} {figures['mean_kl_nats']:.4f} / {answers['mean_kl_nats']:.4f}   "
        f"{figures['top1_agreement']:.3f} / {answers['top1_agreement']:.3f}",
        flush=True,
    )
    return figures


if __name__ == "__main__":
    main()
