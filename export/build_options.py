"""What a user chooses for a build, and how the build reports what it does."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from calibration.precision_search import Bound
from calibration.precisions.catalog import AUTO, DEFAULT_CHOICE, FLOAT, STORED, STORED_CHOICES
from calibration.search import Effort, WeightRounding
from engines.contract import INTEGER_CACHES, KV_DTYPES, MAX_WIDTH
from engines.onnxruntime.kernels import NATIVE
from engines.tensorrt.plans import ComputeType
from quasar.checkpoints import Checkpoint
from quasar.errors import BuildError

DEFAULT_MAX_LENGTH = 4096
# A prompt, an answer, and the widest verify call.
MIN_MAX_LENGTH = 2 * MAX_WIDTH


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What the user chose.

    `precision` None: w8a8, or w8a8-block where the answers of w8a8 are too far from the float model's; "stored" for a
    checkpoint that GPTQ, AWQ or compressed-tensors quantized. `calibration_tokens` None: by the model's size.
    `max_length` None: the smaller of the model's context and 4096. `alpha` None: auto. `kernels` "native": a directory
    for those alone; None: for every back end, as the option is left out. `weights`: how they are rounded; None: as
    `effort` and the precision have it. `rotate`: turn the residual stream and the values (`calibration.rotation`).
    `blocks`: whether linears may get scales in blocks where nobody asks for them; not where a back end is compiled that
    lacks them.
    """

    model: str
    output: Path
    precision: str | None = None
    alpha: str | float | None = None
    calibration: Path | None = None
    calibration_tokens: int | None = None
    max_length: int | None = None
    keep_float: tuple[str, ...] = ()
    max_kl: float | None = None
    min_top1: float | None = None
    max_width: int = MAX_WIDTH
    tree_mask: bool = False
    kv_dtype: str = "float32"
    skip_layers: str = ""
    effort: Effort = "normal"
    weights: WeightRounding | None = None
    kernels: str | None = None
    rotate: bool = False
    blocks: bool = True
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """What the user chose for a back end that is added to an engine directory.

    No `compute_capabilities`: this machine's GPU, else 8.6, 8.9 and 12.0, for CUDA 8.0 and 9.0 as well. `compute_type`:
    of the KV cache, but for one in INT8 on CUDA, and with TensorRT of values around the matmuls. `fused_quantization`:
    amax and INT8 quantization as one kernel of ours inside the plan (TensorRT only). `fused_linears`: that, and the
    rest of each linear that is W8A8 per token as another.
    """

    directory: Path
    backend: str
    compute_capabilities: tuple[str, ...] = ()
    compute_type: ComputeType = "float16"
    plugins: tuple[Path, ...] = ()
    fused_quantization: bool = False
    fused_linears: bool = False


class Reporter(Protocol):
    """Hears what a build does."""

    def stage(self, title: str, detail: str = "") -> None:
        """A stage begins."""

    def steps(self, description: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """Progress of long work: a context manager that gives a function to call with the steps done.

        `total` None: nobody knows how many there will be.
        """


class Silent:
    """A reporter that shows nothing."""

    def stage(self, title: str, detail: str = "") -> None:
        """Nothing to show."""

    @contextmanager
    def steps(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:  # noqa: ARG002 - shows nothing
        """Nothing to show."""
        yield lambda count: None


def check_options(options: BuildOptions) -> None:
    """Raise `BuildError` for options that contradict each other, or that no verifier can have."""
    if not 2 <= options.max_width <= MAX_WIDTH:
        raise BuildError(f"--max-width is {options.max_width}; 2 to {MAX_WIDTH} positions were expected")
    if options.kernels not in (None, NATIVE):
        raise BuildError(f"--kernels is {options.kernels!r}; {NATIVE!r} was expected, or nothing for every back end")
    if options.kv_dtype not in KV_DTYPES:
        raise BuildError(f"--kv-dtype is {options.kv_dtype!r}; {', '.join(KV_DTYPES)} were expected")
    if options.precision == AUTO and options.skip_layers:
        raise BuildError(
            "--precision auto aims at a fidelity that an engine without some layers cannot have: "
            "leave out --skip-layers, or take another precision"
        )
    if options.precision == AUTO:
        bound_of(options).check()
    elif options.max_kl is not None or options.min_top1 is not None:
        raise BuildError("--max-kl and --min-top1 have a meaning with --precision auto alone: leave them out")
    if options.weights not in (None, "rtn") and options.alpha not in (None, "auto"):
        raise BuildError(
            f"--weights {options.weights} is a search, and --alpha {options.alpha} leaves searches out: "
            "take one of the two"
        )
    if options.weights not in (None, "rtn") and options.precision in (None, AUTO):
        raise BuildError(
            f"--weights {options.weights} rounds linears of one precision, and without --precision, or with {AUTO}, "
            "they may get another one: say which"
        )
    of_search = {**_of_calibration(options), "--rotate": options.rotate or None}
    if options.kv_dtype in INTEGER_CACHES:
        # The scales of the cache come from it.
        del of_search["--calibration"], of_search["--calibration-tokens"]
    meaningless: dict[str, dict[str, object]] = {
        FLOAT.choice: {**of_search, "--keep-float": options.keep_float or None},
        **dict.fromkeys(STORED_CHOICES, of_search),
    }
    for name, value in meaningless.get(options.precision or "", {}).items():
        if value is not None:
            raise BuildError(f"{name} has no meaning with --precision {options.precision}: leave it out")


def _of_calibration(options: BuildOptions) -> dict[str, object]:
    return {
        "--alpha": options.alpha,
        "--calibration": options.calibration,
        "--calibration-tokens": options.calibration_tokens,
        "--weights": options.weights,
    }


def choose_precision(options: BuildOptions, checkpoint: Checkpoint) -> str | None:
    """What `--precision` stands for where it is left out: a quantized checkpoint is taken as it is.

    Unless an option asks for calibration: then its weights are taken for floats.
    """
    if options.precision is not None:
        return options.precision
    if checkpoint.quantized_by and not any(_of_calibration(options).values()):
        return STORED
    # A gate could decide for blocks.
    return None if options.blocks else DEFAULT_CHOICE


def bound_of(options: BuildOptions) -> Bound:
    """How faithful the engine must be, with precision "auto"."""
    return Bound(max_kl=options.max_kl, min_top1=options.min_top1)


def choose_max_length(asked: int | None, context: int) -> int:
    """The longest context to build for; raises `BuildError` if the model or the verify call cannot have it."""
    if asked is None:
        return min(context, DEFAULT_MAX_LENGTH)
    if asked > context:
        raise BuildError(f"--max-length {asked} is more than the model's context of {context} tokens")
    if asked < MIN_MAX_LENGTH:
        raise BuildError(f"--max-length {asked} is too short; {MIN_MAX_LENGTH} or more was expected")
    return asked
