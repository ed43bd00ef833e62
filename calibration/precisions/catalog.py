"""Every precision, and what `--precision` may ask for."""

from collections.abc import Iterable

from calibration.precisions.base import NATIVE, Precision, Refused
from calibration.precisions.block import InBlocks
from calibration.precisions.float import Float
from calibration.precisions.nibble import (
    FloatNibbles,
    Nibbles,
    OffsetFloatNibbles,
    OffsetNibbles,
    WideFloatNibbles,
    WideNibbles,
    WideOffsetFloatNibbles,
    WideOffsetNibbles,
)
from calibration.precisions.static import Static
from calibration.precisions.token import PerToken
from quasar.errors import BuildError

# By name, coarsest first.
PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        WideNibbles(),
        WideOffsetNibbles(),
        Nibbles(),
        OffsetNibbles(),
        WideFloatNibbles(),
        WideOffsetFloatNibbles(),
        FloatNibbles(),
        OffsetFloatNibbles(),
        Static(),
        PerToken(),
        InBlocks(),
        Float(),
    )
}
FLOAT = PRECISIONS[Float.name]
# Linear by linear: the fastest precision of the ladder with which a bound on fidelity is met.
AUTO = "auto"
# Linear by linear: the precision whose grid holds the weights as the checkpoint has them; where those have 4 bits, with
# activations in INT8, or in floats.
STORED, STORED_FLOATS = "stored", "stored-a16"
STORED_CHOICES = (STORED, STORED_FLOATS)
DEFAULT_CHOICE = PerToken.choice
# What a linear gets that no grid holds as it is stored, the first that it can have: 8 bits lose least.
ROUNDED_ANEW = (PRECISIONS[InBlocks.name], PRECISIONS[PerToken.name])
# Of a draft head's linears: what it says is verified, and its weights come from memory after each pass.
DEFAULT_HEAD_CHOICE = Nibbles.choice


def precision_of(name: str) -> Precision:
    """The precision of that name in a manifest; raises `BuildError` naming those that there are."""
    if name not in PRECISIONS:
        raise BuildError(f"a linear's precision is {name!r}; {', '.join(PRECISIONS)} were expected")
    return PRECISIONS[name]


def ladder() -> tuple[Precision, ...]:
    """What "auto" may give a linear, coarsest first: it begins with the first, and the last is float."""
    return tuple(precision for precision in PRECISIONS.values() if precision.is_on_ladder)


def rungs_above(precision: Precision) -> tuple[Precision, ...]:
    """The quantized rungs of the ladder that are finer."""
    rungs = ladder()
    return tuple(rung for rung in rungs[rungs.index(precision) + 1 :] if rung is not FLOAT)


def choices() -> tuple[str, ...]:
    """What `--precision` may ask for: the quantized ones, those of the ladder first, auto, and float."""
    quantized = [one for one in PRECISIONS.values() if one.is_quantized and not one.has_offsets]
    quantized.sort(key=lambda precision: not precision.is_on_ladder)
    return (*(precision.choice for precision in quantized), AUTO, *STORED_CHOICES, FLOAT.choice)


def precisions_for(choice: str) -> tuple[Precision, ...]:
    """What linears may have in an engine of that `--precision`, the one to begin with first; else `BuildError`."""
    if choice == AUTO:
        return ladder()
    if choice in STORED_CHOICES:
        return ROUNDED_ANEW
    for precision in PRECISIONS.values():
        if precision.choice == choice and choice in choices():
            return (precision,)
    raise BuildError(f"--precision is {choice!r}; {', '.join(choices())} were expected")


def holders(choice: str) -> tuple[Precision, ...]:
    """Precisions that may hold a stored weight, the preferred first; `choice`: one of `STORED_CHOICES`."""
    floats_first = sorted(PRECISIONS.values(), key=lambda one: not one.drafts_as)
    return tuple(floats_first if choice == STORED_FLOATS else PRECISIONS.values())


def head_choices() -> tuple[str, ...]:
    """What a draft head's linears may have: all that native kernels run and that rounding to nearest makes."""
    return tuple(
        one.choice
        for one in PRECISIONS.values()
        if not one.has_static_scale and not one.has_offsets and not isinstance(one.lowering(NATIVE), Refused)
    )


def refusal(names: Iterable[str], backend: str) -> str:
    """Why a back end cannot run linears of these precisions: the first sentence found, or "" if it can."""
    lowerings = (precision_of(name).lowering(backend) for name in names)
    return next((lowering.reason for lowering in lowerings if isinstance(lowering, Refused)), "")


def choices_on(backend: str) -> str:
    """The quantized choices that a back end does not refuse, as messages name them: "… or …"."""
    taken = [
        precision.choice
        for precision in PRECISIONS.values()
        if precision.choice in choices() and precision.is_quantized
        if not isinstance(precision.lowering(backend), Refused)
    ]
    return " or ".join(sorted(taken, key=choices().index))


def choices_help() -> str:
    """What `--help` says of `--precision`."""
    first, *higher = ladder()
    *some, last = (precision.label for precision in higher)
    raised = f"{', '.join(some)} or {last}"
    ladder_help = f"{AUTO}: {first.choice}, with linears raised to {raised} until --max-kl or --min-top1 is met."
    default = precisions_for(DEFAULT_CHOICE)[0]
    finer = rungs_above(default)[0]
    no_precision = (AUTO, *STORED_CHOICES, FLOAT.choice)
    said = [f"{choice}: {precisions_for(choice)[0].help}" for choice in choices() if choice not in no_precision]
    default_help = f"Default: {default.choice}, or {finer.choice} where its answers are too far from the float model's."
    stored_help = (
        f"{STORED}: on the grid that a quantized checkpoint has (the default for those of GPTQ, AWQ and "
        f"compressed-tensors), without calibration; {STORED_FLOATS}: with activations of 16 bits where weights have 4 "
        "bits."
    )
    return f"{'; '.join(said)}. {ladder_help} {stored_help} {default_help}"
