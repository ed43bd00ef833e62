"""What a pass computes, step by step, and where its tensors lie: written when an engine is compiled for CUDA."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from engines.fields import check_fields
from plugins.gpu.variants import (
    FORMS,
    PER_TOKEN,
    AttendCache,
    AttendPath,
    BlockLinear,
    GatherRows,
    KvCompact,
    Likelihoods,
    LinearVariant,
    LmHead,
    MergeLikeliest,
    NormAdd,
    NormQuantize,
    PlaceRows,
    RotateAppend,
    Variant,
    W8A8Linear,
    power_of_2,
)
from quasar.errors import DamagedEngineError

# What the names of a draft head's tensors begin with: they lie beside the verifier's.
HEAD_PREFIX = "draft_head."
# The verifier's token of each token that a head drafts: int64 [draft vocabulary].
TARGETS = f"{HEAD_PREFIX}targets"
# Buffers hold float32 [tokens, columns] and are named by the graph's values; "" is none. Tensors are named as in the
# graph and lie in the weights' file.


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor in the weights' file: `offset` and `bytes` of it."""

    offset: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """output = rows of a table [V, columns] of float32, float16 or bfloat16, by token, times `scale`."""

    table: str
    table_type: str
    columns: int
    scale: float
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Receive:
    """output = what the host gives to the pass: float32 [tokens, columns]. Before all other steps."""

    columns: int
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """The host gets the input, float32 [tokens, columns]; `selected`: of the rows whose logits are asked for alone."""

    input: str
    columns: int
    selected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceColumns:
    """Columns of output, [tokens, width], from `first` on = the input, or an RMS norm of it if `norm` is given.

    `selected`: of the rows whose logits are asked for.
    """

    input: str
    norm: str
    epsilon: float
    columns: int
    first: int
    width: int
    selected: bool
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """output = x Wᵀ of the quantized x, after an RMS norm of x if `norm` is given; then bias, the gate or the residual.

    `gate`: one of `plugins.gpu.variants.GATES`, `form` one of its `FORMS`. `outputs`: columns of the output, half of
    the weight's with a gate.
    """

    input: str
    norm: str
    epsilon: float
    weight: str
    scale: str
    bias: str
    residual: str
    gate: str
    form: str
    inputs: int
    outputs: int
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AddNorm:
    """output = residual + the RMS norm of the input."""

    input: str
    norm: str
    epsilon: float
    residual: str
    columns: int
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """output = attention of a layer over packed q/k/v, whose keys and values go to the cache.

    `cos` and `sin` float32 [positions, rotary / 2], or "" where `rotary` is 0; `q_norm` and `k_norm` float32
    [head_size], or with `row_norm` [heads · head_size] and [kv_heads · head_size], or ""; `key_scale` and `value_scale`
    float32 [kv_heads, head_size] of an INT8 cache, else "".
    """

    layer: int
    input: str
    cos: str
    sin: str
    q_norm: str
    k_norm: str
    row_norm: bool
    key_scale: str
    value_scale: str
    heads: int
    kv_heads: int
    head_size: int
    rotary: int
    scale: float
    softcap: float
    window: int
    epsilon: float
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Select:
    """output = the rows of the input whose logits are asked for."""

    input: str
    columns: int
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The likeliest tokens after each selected row, and its logits if they are wanted.

    `likelihoods`: the host gets the log-probabilities of those tokens as well, as a draft head tells them.
    `softcap`: logits become softcap · tanh(logit / softcap); 0: they stay. `form` as in `Linear`.
    """

    input: str
    norm: str
    epsilon: float
    weight: str
    scale: str
    bias: str
    softcap: float
    form: str
    inputs: int
    vocabulary: int
    likelihoods: bool


Step = Embed | Receive | Tell | PlaceColumns | Linear | AddNorm | Attention | Select | Head
_KINDS = (Embed, Receive, Tell, PlaceColumns, Linear, AddNorm, Attention, Select, Head)
_STEPS: dict[str, type[Step]] = {kind.__name__.lower(): kind for kind in _KINDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Steps in order, and tensors by name. `cache_type`: float16, bfloat16 or int8. `reach`: the widest verify pass."""

    cache_type: str
    reach: int
    top_k: int
    tensors: Mapping[str, Tensor]
    steps: tuple[Step, ...]

    @property
    def likeliest(self) -> int:
        """Keys that a tile of the LM head leaves: at least one, for the next token."""
        return max(1, self.top_k)

    def variants(self) -> list[Variant]:
        """Every kernel that a pass of any width may launch, each once."""
        return list(dict.fromkeys(self._variants()))

    def attention_variants(self, step: Attention) -> tuple[RotateAppend, AttendCache, AttendPath]:
        """The kernels of a layer's attention."""
        shape = {
            "group": step.heads // step.kv_heads,
            "head_size": step.head_size,
            "reach": self.reach,
            "cache_type": self.cache_type,
            "softcap": step.softcap > 0,
            "window": step.window > 0,
        }
        rotate = RotateAppend(
            head_size=step.head_size,
            rotary=step.rotary,
            cache_type=self.cache_type,
            norm=bool(step.q_norm),
            row=power_of_2(step.heads * step.head_size) if step.row_norm else 0,
        )
        return rotate, AttendCache(**shape), AttendPath(**shape)  # type: ignore[arg-type]

    def _variants(self) -> Iterator[Variant]:
        for step in self.steps:
            match step:
                case Embed():
                    yield GatherRows(table_type=step.table_type)
                case Select():
                    yield GatherRows(table_type="float32")
                case Linear():
                    yield quantize_variant(step)
                    yield from (linear_variant(step, tokens) for tokens in FORMS[step.form].tile_tokens)
                case PlaceColumns():
                    yield place_variant(step)
                case AddNorm():
                    yield NormAdd.of(step.columns)
                case Attention():
                    yield from self.attention_variants(step)
                case Head():
                    yield quantize_variant(step)
                    yield from (self.head_variant(step, tokens) for tokens in FORMS[step.form].head_tile_tokens)
                    yield from (MergeLikeliest(likeliest=self.likeliest, final=final) for final in (False, True))
                    if step.likelihoods:
                        yield Likelihoods(likeliest=self.top_k)
                case Receive() | Tell():
                    continue
        yield KvCompact()

    def head_variant(self, step: Head, tokens: int) -> LmHead:
        """The LM head's kernel for tiles of so many tokens."""
        return LmHead(
            tokens=tokens, likeliest=self.likeliest, bias=bool(step.bias), softcap=step.softcap > 0, form=step.form
        )

    def to_json(self) -> dict[str, Any]:
        """The program's file."""
        steps = [{"step": type(step).__name__.lower(), **asdict(step)} for step in self.steps]
        tensors = {name: asdict(tensor) for name, tensor in self.tensors.items()}
        return {**{name: getattr(self, name) for name in _SIZES}, "tensors": tensors, "steps": steps}

    @classmethod
    def from_json(cls, value: Any, file: str = "program.json") -> "Program":
        """Read that file, of such a name; raises `DamagedEngineError` naming what does not fit."""
        if not isinstance(value, Mapping) or not isinstance(value.get("steps"), list):
            raise DamagedEngineError(f"{file}: there is no list of steps")
        tensors = value.get("tensors")
        if not isinstance(tensors, Mapping):
            raise DamagedEngineError(f"{file}: there are no tensors")
        sizes = check_fields("the program", {name: value.get(name) for name in _SIZES}, _SIZES, file=file)
        place: dict[str, Any] = {"offset": int, "bytes": int}
        steps = tuple(_step(one, file) for one in value["steps"])
        for step in steps:
            has_scales = isinstance(step, Attention) and bool(step.key_scale and step.value_scale)
            if isinstance(step, Attention) and has_scales != (sizes["cache_type"] == "int8"):
                raise DamagedEngineError(
                    f"{file}: layer {step.layer} has {'' if has_scales else 'no '}scales for a cache in "
                    f"{sizes['cache_type']}"
                )
        return cls(
            **sizes,
            tensors={
                name: Tensor(**check_fields(f"tensor {name}", one, place, file=file)) for name, one in tensors.items()
            },
            steps=steps,
        )


_SIZES: dict[str, Any] = {"cache_type": str, "reach": int, "top_k": int}


def quantize_variant(step: Linear | Head) -> NormQuantize:
    """The kernel that quantizes what a linear reads."""
    return NormQuantize.of(step.inputs, norm=bool(step.norm), form=step.form)


def place_variant(step: PlaceColumns) -> PlaceRows:
    """The kernel that places rows."""
    return PlaceRows.of(step.columns, step.first, step.width, norm=bool(step.norm))


def linear_variant(step: Linear, tokens: int) -> LinearVariant:
    """A linear's kernel for tiles of so many tokens."""
    bias, residual = bool(step.bias), bool(step.residual)
    if FORMS[step.form].in_blocks:
        return BlockLinear(form=step.form, tokens=tokens, bias=bias, residual=residual, gate=step.gate)
    return W8A8Linear(tokens=tokens, bias=bias, residual=residual, gate=step.gate)


def _step(value: Any, file: str) -> Step:
    kind = _STEPS.get(value.get("step", "")) if isinstance(value, Mapping) else None
    if kind is None:
        raise DamagedEngineError(f"{file}: a step that this version does not know: {value!r:.60}")
    expected: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    given = {name: item for name, item in value.items() if name != "step"}
    # Programs of earlier versions have one form of linears, caches of floats, and no draft heads.
    for name, earlier in (("form", PER_TOKEN), ("key_scale", ""), ("value_scale", ""), ("likelihoods", False)):
        if name in expected:
            given.setdefault(name, earlier)
    step = kind(**check_fields(f"step {value['step']}", given, expected, file=file))
    if isinstance(step, Linear | Head) and step.form not in FORMS:
        raise DamagedEngineError(f"{file}: a linear of a form that this version does not know: {step.form!r:.60}")
    return step
