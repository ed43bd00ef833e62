"""What kernels take of a GPU, as a table in Markdown: the CUDA back end's, and the linear of TensorRT plans.

They are compiled here, and no GPU is needed.

    python benchmarks/gpu_kernels.py                                     (Qwen3-8B's shape: about two minutes)
    python benchmarks/gpu_kernels.py --shape smollm2 --compute-capability 8.9

For each kernel: threads of a program, and by compute capability registers of a thread and kB of shared memory of a
program. Registers that spilled into memory are an error, which the last line counts.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from random_engine import contract_of
from random_program import write_random_program
from shapes import SHAPES

from export.compile_cuda import DEFAULT_CAPABILITIES
from plugins.gpu import integer_linear
from plugins.gpu.catalog import kernel_of
from plugins.gpu.registers import resources_of


def main() -> int:
    """Print the table; 1 if a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--compute-capability", nargs="+", default=[*DEFAULT_CAPABILITIES], metavar="8.9")
    options = parser.parse_args()
    spec, capabilities = SHAPES[options.shape], options.compute_capability
    # Layers of one kind have the same kernels; nothing reads the weights.
    spec = replace(spec, layers=tuple(dict.fromkeys(spec.layers)))
    program = write_random_program(spec, contract_of(spec, 4096), Path(os.devnull))
    spilled = 0
    print(f"| kernel | threads | {' | '.join(capabilities)} |")
    print("|---|---|" + "---|" * len(capabilities))
    kernels = {variant.name: kernel_of(variant) for variant in program.variants()}
    for name, kernel in {**kernels, "integer_linear": integer_linear.KERNEL}.items():
        cells, threads = [], 0
        for capability in capabilities:
            compiled = kernel.compile(capability)
            resources = resources_of(compiled.image)
            threads, spilled = compiled.threads, spilled + (resources.spilled_bytes > 0)
            cells.append(f"{resources.registers}, {compiled.shared_bytes / 1024:.0f}")
        print(f"| `{name}` | {threads} | {' | '.join(cells)} |", flush=True)
    print(f"\n{spilled} kernels spill registers.")
    return int(spilled > 0)


if __name__ == "__main__":
    raise SystemExit(main())
