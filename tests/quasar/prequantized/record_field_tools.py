"""Write linears that AutoGPTQ and AutoAWQ packed: `python -m tests.quasar.prequantized.record_field_tools FOLDER`.

FOLDER holds both packages as they are published, unpacked side by side (`auto_gptq/`, `awq/`): they need not be
installed, and their own import would ask for other versions of what they stand on. What they pack, and what their own
code makes of it again in float16, goes to `field_tools.safetensors` beside this file, with their versions.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file

RECORDED = Path(__file__).with_name("field_tools.safetensors")
OUTPUTS, INPUTS = 32, 128
# Name → bits, group, symmetric, whether inputs of a group lie apart.
GPTQ = {
    "gptq": (4, 32, True, False),
    "gptq with zeros": (4, 128, False, False),
    "gptq, 8 bits": (8, 32, True, False),
    "gptq in another order": (4, 32, True, True),
}
AWQ = {"awq": 32, "awq, wide": 128}


def load(path: Path, name: str) -> ModuleType:
    """A module of a package without the package's own import."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def linear(seed: int) -> torch.nn.Linear:
    """One of float16 with random weights."""
    made = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    torch.nn.init.normal_(made.weight, std=0.05, generator=torch.Generator().manual_seed(seed))
    return made.half()


def by_gptq(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """AutoGPTQ's linear over what its own quantizer finds, group by group."""
    module = load(folder / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py", "auto_gptq_linear")
    quantizer = load(folder / "auto_gptq/quantization/quantizer.py", "auto_gptq_quantizer").Quantizer()
    bits, group, symmetric, apart = GPTQ[name]
    made, order = linear(len(name)), torch.arange(INPUTS)
    if apart:
        order = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(1))
    group_of = torch.empty(INPUTS, dtype=torch.int32)
    group_of[order] = torch.arange(INPUTS, dtype=torch.int32) // group
    quantizer.configure(bits, perchannel=True, sym=symmetric)
    scales, zeros = [], []
    for number in range(INPUTS // group):
        quantizer.find_params(made.weight.data[:, group_of == number].float(), weight=True)
        scales.append(quantizer.scale.half())
        zeros.append(quantizer.zero.half())
    packed = module.QuantLinear(bits, group, INPUTS, OUTPUTS, bias=False)
    packed.pack(made, torch.cat(scales, 1), torch.cat(zeros, 1), group_of)
    # The identity through its own product: what it takes each weight for.
    weight = packed(torch.eye(INPUTS, dtype=torch.float16)).T
    tensors = {part: getattr(packed, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
    return {**tensors, "weight": weight}


def by_awq(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """AutoAWQ's linear for matrix products, over the range of each group."""
    for package in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        sys.modules[package] = ModuleType(package)
    for module in ("utils/module", "utils/utils", "utils/packing_utils"):
        load(folder / f"awq/{module}.py", f"awq.{module.replace('/', '.')}")
    gemm = load(folder / "awq/modules/linear/gemm.py", "awq.modules.linear.gemm")
    unpack = sys.modules["awq.utils.packing_utils"].dequantize_gemm
    group, made = AWQ[name], linear(len(name))
    grouped = made.weight.data.unflatten(1, (-1, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = (high - low).clamp(min=1e-5) / 15
    zero = (-(low / scale).round()).clamp(0, 15)
    rounded = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    made.weight.data = ((rounded - zero[..., None]) * scale[..., None]).flatten(1)
    packed = gemm.WQLinear_GEMM.from_linear(made, 4, group, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
    tensors = {part: getattr(packed, part) for part in ("qweight", "qzeros", "scales")}
    return {**tensors, "weight": unpack(*tensors.values(), 4, group).T}


def main() -> None:
    """Record every one."""
    folder = Path(sys.argv[1])
    versions = {"torch": str(torch.__version__)}
    for tool, package in (("AutoGPTQ", "auto_gptq"), ("AutoAWQ", "awq")):
        source = (folder / package / "__init__.py").read_text(encoding="utf-8")
        versions[tool] = source.split('__version__ = "')[1].split('"')[0]
    tensors: dict[str, torch.Tensor] = {}
    for names, pack in ((GPTQ, by_gptq), (AWQ, by_awq)):
        for name in names:
            tensors |= {f"{name}/{part}": value.contiguous() for part, value in pack(folder, name).items()}
    save_file(tensors, RECORDED, metadata=versions)
    print(versions, RECORDED.stat().st_size)


if __name__ == "__main__":
    main()
