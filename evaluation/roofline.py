"""What a GPU's memory and tensor cores allow of a verify pass: a model of the hardware's limits, not a measurement.

A pass takes at least the larger of two times: that of moving its bytes at the memory's bandwidth, and that of its
operations at the tensor cores' rates. Launching kernels, synchronizing, and whatever a kernel leaves unused come on
top, so that real passes are slower.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calibration.precisions.catalog import DEFAULT_CHOICE, FLOAT, precision_of, precisions_for
from engines.contract import KV_DTYPES
from engines.directory import EngineDirectory
from engines.onnxruntime.files import onnxruntime_files
from export.layout import CANONICAL
from quasar.errors import EngineError, QuasarError

NOTE = "a model of the hardware's limits, not a measurement"
WIDTHS = (1, 2, 4, 8, 16, 32)
CACHED_LENGTHS = (256, 2048, 8192)

# Bytes of a value in FP16 or BF16: activations, embedding, KV cache and float linears.
_FLOAT16_BYTES = 2
# A multiply-add is two operations in the rates of datasheets.
_MULTIPLY_ADD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLimits:
    """A GPU as its datasheet has it; rates are those of dense matrices, without sparsity.

    `bandwidth_gb_s`: of its memory, in 10^9 bytes a second. `int8_tops`, `float16_tflops`: of its tensor cores, in
    10^12 operations a second; the second is that of FP16 and BF16 alike. `memory_gb`: 10^9 bytes.
    """

    title: str
    bandwidth_gb_s: float
    int8_tops: float
    float16_tflops: float
    memory_gb: float
    compute_capability: str


# Compute capabilities: NVIDIA's list "CUDA GPU Compute Capability".
GPUS = {
    # "NVIDIA A10 Tensor Core GPU" datasheet: INT8 250 | 500*, FP16 and BF16 125 | 250*; * with sparsity.
    "a10": GpuLimits(
        title="A10",
        bandwidth_gb_s=600,
        int8_tops=250,
        float16_tflops=125,
        memory_gb=24,
        compute_capability="8.6",
    ),
    # "NVIDIA A100 Tensor Core GPU" datasheet, column A100 80GB SXM: INT8 624 | 1248*, FP16 and BF16 312 | 624*.
    "a100": GpuLimits(
        title="A100 80 GB SXM",
        bandwidth_gb_s=2039,
        int8_tops=624,
        float16_tflops=312,
        memory_gb=80,
        compute_capability="8.0",
    ),
    # "NVIDIA L40S" datasheet: INT8 733 | 1,466*, FP16 and BF16 362.05 | 733*.
    "l40s": GpuLimits(
        title="L40S",
        bandwidth_gb_s=864,
        int8_tops=733,
        float16_tflops=362.05,
        memory_gb=48,
        compute_capability="8.9",
    ),
    # "NVIDIA Ada GPU Architecture" whitepaper, table of the GeForce RTX 4090: INT8 660.6, FP16 and BF16 with FP32
    # accumulation 165.2. FP16 accumulation is twice as fast, and not what attention sums in.
    "rtx-4090": GpuLimits(
        title="RTX 4090",
        bandwidth_gb_s=1008,
        int8_tops=660.6,
        float16_tflops=165.2,
        memory_gb=24,
        compute_capability="8.9",
    ),
    # "NVIDIA H100 Tensor Core GPU" datasheet, column H100 SXM: INT8 3,958*, FP16 and BF16 1,979*, with sparsity alone:
    # half of them are the dense ones.
    "h100": GpuLimits(
        title="H100 SXM",
        bandwidth_gb_s=3350,
        int8_tops=1979,
        float16_tflops=989.5,
        memory_gb=80,
        compute_capability="9.0",
    ),
    # "NVIDIA H200 Tensor Core GPU" datasheet, column H200 SXM: the rates of the H100, and another memory.
    "h200": GpuLimits(
        title="H200 SXM",
        bandwidth_gb_s=4800,
        int8_tops=1979,
        float16_tflops=989.5,
        memory_gb=141,
        compute_capability="9.0",
    ),
}


def gpu_limits(name: str) -> GpuLimits:
    """The GPU of that name, in capitals or not; raises `QuasarError` naming those that are known."""
    if name.lower() not in GPUS:
        raise QuasarError(f"the GPU is {name!r}; {', '.join(GPUS)} are known")
    return GPUS[name.lower()]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedLinear:
    """A linear of a pass: rows and columns of its weight, in values, and the name of its precision."""

    name: str
    outputs: int
    inputs: int
    precision: str

    @property
    def runs_in_int8(self) -> bool:
        """Whether its multiply-adds are those of INT8; else they run in 16 bits."""
        return precision_of(self.precision).has_integer_activations

    @property
    def num_bytes(self) -> int:
        """Bytes of weights and scales; 16 bits a weight where they are float, as GPUs store those."""
        precision = precision_of(self.precision)
        if not precision.is_quantized:
            return _FLOAT16_BYTES * self.outputs * self.inputs
        return precision.num_bytes(self.outputs, self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder, as its config has them: `head_size` values to a head, `vocab` tokens."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int

    def linears(self, precision: str) -> tuple[SizedLinear, ...]:
        """Every linear in the order of a pass, fused as in an engine and all of that precision; the LM head is last."""
        query, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        sizes = {
            "self_attn.qkv_proj": (query + 2 * kv, self.hidden),
            "self_attn.o_proj": (self.hidden, query),
            "mlp.gate_up_proj": (2 * self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        named = [
            *((f"layers.{layer}.{name}", size) for layer in range(self.layers) for name, size in sizes.items()),
            ("lm_head", (self.vocab, self.hidden)),
        ]
        return tuple(
            SizedLinear(name=name, outputs=outputs, inputs=inputs, precision=precision)
            for name, (outputs, inputs) in named
        )


# From the models' config.json.
SHAPES = {
    "qwen3-8b": ModelShape(
        layers=36, hidden=4096, intermediate=12288, heads=32, kv_heads=8, head_size=128, vocab=151936
    ),
    "llama-3-8b": ModelShape(
        layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_size=128, vocab=128256
    ),
    "smollm2": ModelShape(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_size=64, vocab=49152),
    "qwen3-1.7b": ModelShape(
        layers=28, hidden=2048, intermediate=6144, heads=16, kv_heads=8, head_size=128, vocab=151936
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PassModel:
    """What passes of a model move and compute, without sliding windows: every layer reads all cached positions.

    `precision`: what the linears are together, for people. `cache_value_bytes`: of a value of the KV cache.
    `max_width`, `max_length`: positions of a pass, and cached ones, that an engine takes; None without an engine.
    """

    name: str
    precision: str
    linears: tuple[SizedLinear, ...]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    cache_value_bytes: int = _FLOAT16_BYTES
    max_width: int | None = None
    max_length: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and scales that every pass reads: all linears, the LM head included, once."""
        return sum(linear.num_bytes for linear in self.linears)

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of the KV cache: keys and values of every layer."""
        return self.cache_value_bytes * 2 * self.layers * self.kv_heads * self.head_size

    def held_bytes(self, cached_length: int) -> int:
        """Bytes that lie in the GPU's memory: linears, the embedding in 16 bits, and the cached positions."""
        embedding = _FLOAT16_BYTES * self.vocab * self.hidden
        return self.weight_bytes + embedding + cached_length * self.position_bytes

    def pass_bytes(self, width: int, cached_length: int) -> int:
        """Bytes that a pass of that many positions moves between memory and cores.

        Linears once, the fed tokens' rows of the embedding, the cached positions read and the new ones written, and
        the inputs and outputs of every linear in 16 bits. Norms and biases are left out, as are scores of attention.
        """
        activations = sum(linear.inputs + linear.outputs for linear in self.linears)
        per_position = _FLOAT16_BYTES * (self.hidden + activations) + self.position_bytes
        return self.weight_bytes + cached_length * self.position_bytes + width * per_position

    def operations(self, width: int, cached_length: int) -> tuple[int, int]:
        """Operations of a pass, in INT8 and in 16 bits; a multiply-add is two.

        In INT8: quantized linears. In 16 bits: float linears, and attention of a chain, in which a position sees the
        cached ones, the new ones before it, and itself.
        """
        int8 = sum(one.outputs * one.inputs for one in self.linears if one.runs_in_int8)
        float16 = sum(one.outputs * one.inputs for one in self.linears if not one.runs_in_int8)
        pairs = width * cached_length + width * (width + 1) // 2
        # Queries with keys, and weights with values.
        attention = 2 * self.layers * self.heads * self.head_size * pairs
        return _MULTIPLY_ADD * width * int8, _MULTIPLY_ADD * (width * float16 + attention)

    def in_bf16(self) -> "PassModel":
        """The same model with every linear, and the KV cache, in BF16."""
        linears = tuple(replace(linear, precision=FLOAT.name) for linear in self.linears)
        return replace(self, precision="bf16", linears=linears, cache_value_bytes=_FLOAT16_BYTES)


def shape_model(name: str) -> PassModel:
    """A model of `SHAPES` in W8A8 per token; raises `QuasarError` naming those that are known."""
    if name not in SHAPES:
        raise QuasarError(f"--shape is {name!r}; {', '.join(SHAPES)} are known")
    return model_of(name, SHAPES[name])


def model_of(name: str, shape: ModelShape) -> PassModel:
    """A model without an engine: all linears in W8A8 per token, one byte a weight and float32 scales."""
    return PassModel(
        name=name,
        precision=DEFAULT_CHOICE,
        linears=shape.linears(precisions_for(DEFAULT_CHOICE)[0].name),
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        vocab=shape.vocab,
    )


def engine_model(directory: EngineDirectory) -> PassModel:
    """An engine: precisions from its manifest, sizes from the tensors that its canonical graph names, none loaded.

    Raises `EngineError` for a graph that lacks the weight of a linear.
    """
    # It brings in onnx, which a shape without an engine does not need.
    import onnx_ir as ir

    if onnxruntime_files(directory.manifest).native_alone:
        raise EngineError(
            f"{directory.path} was built with --kernels native and has no portable graph, which sizes are read from: "
            "build it again without --kernels native"
        )
    tensors = ir.load(directory.file(CANONICAL)).graph.initializers
    manifest, contract = directory.manifest, directory.manifest.contract
    is_quantized = any(precision_of(precision).is_quantized for precision in manifest.linears.values())

    def shape_of(tensor: str) -> tuple[int, ...]:
        shape = tensors[tensor].shape if tensor in tensors else None
        if shape is None or len(shape) != 2:
            raise EngineError(f"{directory.path}: {CANONICAL} has no matrix {tensor}: build the engine again")
        return shape.numpy()

    vocab, hidden = shape_of("embed_tokens.weight")
    linears = []
    for name, precision in manifest.linears.items():
        # A float head that is tied reads the embedding's tensor and has none of its own.
        tied = name == "lm_head" and f"{name}.weight" not in tensors
        inputs, outputs = (hidden, vocab) if tied else shape_of(f"{name}.weight")
        linears.append(SizedLinear(name=name, outputs=outputs, inputs=inputs, precision=precision))
    query_size, _ = shape_of("layers.0.self_attn.o_proj.weight")
    return PassModel(
        name=str(manifest.model["name"]),
        # An engine in float32 is counted in 16 bits, and called so.
        precision=manifest.precision if is_quantized else "float16",
        linears=tuple(linears),
        layers=contract.num_layers,
        hidden=hidden,
        heads=query_size // contract.head_size,
        kv_heads=contract.num_kv_heads,
        head_size=contract.head_size,
        vocab=vocab,
        # GPUs hold floats of a cache in 16 bits, whatever type the CPU has.
        cache_value_bytes=min(_FLOAT16_BYTES, KV_DTYPES[contract.kv_dtype]),
        max_width=contract.max_width,
        max_length=contract.max_length,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLimit:
    """What a GPU allows of one pass: milliseconds of its bytes and of its operations, which overlap at best."""

    memory_ms: float
    compute_ms: float

    @property
    def ms(self) -> float:
        """The larger of the two: milliseconds below which the pass cannot come."""
        return max(self.memory_ms, self.compute_ms)

    @property
    def bound(self) -> str:
        """Which of the two it is: "memory" or "compute"."""
        return "compute" if self.compute_ms > self.memory_ms else "memory"


def pass_limit(model: PassModel, gpu: GpuLimits, width: int, cached_length: int) -> PassLimit:
    """The limits, in milliseconds, of a pass of `width` positions after `cached_length` cached ones.

    INT8 linears and what runs in 16 bits follow each other, so their times add up.
    """
    int8, float16 = model.operations(width, cached_length)
    return PassLimit(
        memory_ms=1e3 * model.pass_bytes(width, cached_length) / (1e9 * gpu.bandwidth_gb_s),
        compute_ms=1e3 * (int8 / (1e12 * gpu.int8_tops) + float16 / (1e12 * gpu.float16_tflops)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPasses:
    """Milliseconds of passes that were measured on a GPU of `GPUS`: cached length → width → ms."""

    gpu: str
    ms: dict[int, dict[int, float]]


def read_measured(path: Path) -> MeasuredPasses:
    """Read {"gpu": "h100", "t_ms": {"<cached length>": {"<width>": ms}}}; raises `QuasarError` saying what is wrong."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise QuasarError(f"{path} is no JSON ({error})") from None
    try:
        gpu, rows = str(value["gpu"]).lower(), value["t_ms"].items()
        ms = {int(length): {int(width): float(one) for width, one in by.items()} for length, by in rows}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        ms = {}
    times = [one for by in ms.values() for one in by.values()]
    positions = [*ms, *(width for by in ms.values() for width in by)]
    if not times or min(positions) < 1 or not all(math.isfinite(one) and one > 0 for one in times):
        raise QuasarError(
            f'{path}: {{"gpu": "h100", "t_ms": {{"2048": {{"1": 3.2}}}}}} was expected: '
            "milliseconds by cached length and width"
        )
    gpu_limits(gpu)
    return MeasuredPasses(gpu=gpu, ms=ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPrediction:
    """One pass on one GPU, in milliseconds, bytes and operations.

    `limit`, `bf16`: the limits of the model and of the same model in BF16. `measured_ms`: what such a pass took there;
    None where it was not measured.
    """

    gpu: str
    cached_length: int
    width: int
    num_bytes: int
    int8_operations: int
    float16_operations: int
    limit: PassLimit
    bf16: PassLimit
    measured_ms: float | None = None

    @property
    def ratio(self) -> float:
        """How many times as long the pass takes in BF16."""
        return self.bf16.ms / self.limit.ms

    @property
    def share(self) -> float | None:
        """The share of the roofline that was reached, from 0 to about 1: predicted / measured milliseconds."""
        return None if self.measured_ms is None else self.limit.ms / self.measured_ms

    def to_json(self) -> dict[str, Any]:
        """The JSON of one pass."""
        value: dict[str, Any] = {
            "gpu": self.gpu,
            "cached_length": self.cached_length,
            "width": self.width,
            "bytes": self.num_bytes,
            "int8_operations": self.int8_operations,
            "float16_operations": self.float16_operations,
            "memory_ms": self.limit.memory_ms,
            "compute_ms": self.limit.compute_ms,
            "ms": self.limit.ms,
            "bound": self.limit.bound,
            "bf16_ms": self.bf16.ms,
            "bf16_bound": self.bf16.bound,
            "bf16_ratio": self.ratio,
        }
        return value if self.measured_ms is None else {**value, "measured_ms": self.measured_ms, "share": self.share}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Predictions for one model: by GPU in the order of `gpus` (their names), then cached length, then width."""

    model: PassModel
    gpus: dict[str, GpuLimits]
    passes: tuple[PassPrediction, ...]

    def too_large_for(self) -> list[str]:
        """Names of GPUs in whose memory the model and the most cached positions asked for do not fit."""
        held = self.model.held_bytes(max(one.cached_length for one in self.passes))
        return [name for name, gpu in self.gpus.items() if held > 1e9 * gpu.memory_gb]

    def to_json(self) -> dict[str, Any]:
        """The command's JSON."""
        model = self.model
        sizes = {name: getattr(model, name) for name in ("layers", "hidden", "heads", "kv_heads", "head_size", "vocab")}
        return {
            "note": NOTE,
            "model": {
                "name": model.name,
                "precision": model.precision,
                **sizes,
                "weight_bytes": model.weight_bytes,
                "bf16_weight_bytes": model.in_bf16().weight_bytes,
                "cache_position_bytes": model.position_bytes,
            },
            "gpus": {name: asdict(gpu) for name, gpu in self.gpus.items()},
            "too_large_for": self.too_large_for(),
            "passes": [one.to_json() for one in self.passes],
        }


def roofline(
    model: PassModel,
    gpus: Sequence[str] = tuple(GPUS),
    *,
    widths: Sequence[int] | None = None,
    cached_lengths: Sequence[int] | None = None,
    measured: MeasuredPasses | None = None,
) -> Roofline:
    """Predict passes of every width and cached length, in positions, on GPUs by name.

    Args:
        model: of `shape_model` or `engine_model`.
        gpus: names in `GPUS`.
        widths, cached_lengths: None for `WIDTHS` and `CACHED_LENGTHS`, as far as the engine goes.
        measured: what stands beside the predictions of its GPU; its widths and cached lengths are added to the others.

    Raises:
        QuasarError: an unknown GPU, or measured passes of a GPU that is not asked for.
        EngineError: a width or a cached length that the engine does not take.
    """
    limits = {name.lower(): gpu_limits(name) for name in gpus}
    if measured is not None and measured.gpu not in limits:
        raise QuasarError(f"the measured passes are of {measured.gpu}, and --gpu is {', '.join(limits)}")
    points: Mapping[int, Mapping[int, float]] = {} if measured is None else measured.ms
    chosen = sorted({*_within(widths, WIDTHS, model.max_width), *(width for by in points.values() for width in by)})
    lengths = sorted({*_within(cached_lengths, CACHED_LENGTHS, model.max_length), *points})
    _check("widths", chosen, model.max_width)
    _check("cached lengths", lengths, model.max_length)
    bf16 = model.in_bf16()
    passes = []
    for name, gpu in limits.items():
        own = points if measured is not None and measured.gpu == name else {}
        for length in lengths:
            for width in chosen:
                int8, float16 = model.operations(width, length)
                passes.append(
                    PassPrediction(
                        gpu=name,
                        cached_length=length,
                        width=width,
                        num_bytes=model.pass_bytes(width, length),
                        int8_operations=int8,
                        float16_operations=float16,
                        limit=pass_limit(model, gpu, width, length),
                        bf16=pass_limit(bf16, gpu, width, length),
                        measured_ms=own.get(length, {}).get(width),
                    )
                )
    return Roofline(model=model, gpus=limits, passes=tuple(passes))


def _within(asked: Sequence[int] | None, usual: Sequence[int], most: int | None) -> list[int]:
    """What was asked for, else the usual numbers of positions as far as `most`, else `most` alone."""
    if asked:
        return list(asked)
    return [one for one in usual if most is None or one <= most] or [most or usual[0]]


def _check(what: str, values: Sequence[int], most: int | None) -> None:
    if min(values) < 1 or (most is not None and max(values) > most):
        expected = "1 or more" if most is None else f"1 to {most}"
        raise EngineError(f"{what} are {list(values)}; {expected} were expected")
