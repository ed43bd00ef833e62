"""Drafters by name: the project's own, and those that installed packages bring."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from quasar.errors import GenerationError, QuasarError
from runtime.drafters.base import Drafter
from runtime.drafters.draft_engine import DraftEngine, DraftEngines, EngineDrafter
from runtime.drafters.draft_head import DraftHeadCache, HeadDrafter
from runtime.drafters.inner_drafts import InnerDrafts
from runtime.drafters.persistent_successors import PersistentSuccessors
from runtime.drafters.prediction import PredictedAnswer, Prediction
from runtime.drafters.prompt_lookup import PromptLookup
from runtime.drafters.recycling import Recycling
from runtime.drafters.suffix import Suffix

# The entry-point group under which a package registers a `Factory` by name.
ENTRY_POINTS = "quasar_verifier.drafters"
NONE, AUTO = "none", "auto"
# Joins the others wherever there is a prediction.
_PREDICTION = Prediction.name
# These load an engine: that of a directory after a colon, or the verifier's own in another graph.
_LOAD_ENGINES = ("model", "self", "hierarchical")
# After "recycling:": successors are kept between processes.
_KEEPS = "kept"
_SIZES = re.compile(r"(\d{1,9})-(\d{1,9})")
# Branches of trees, where they are exact: more were hardly ever verified (docs/drafters.md, "Constants").
_SUFFIX_BRANCHES, _RECYCLING_BRANCHES = 2, 4
# The same of trees that are proposed to an engine that drafts: with few drafts, more are never taken.
_INNER_BRANCHES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierProfile:
    """The verifier that drafts are made for.

    `trees`: whether they are exact on it. `tells_successors`: whether its passes tell the likeliest tokens. `warm`:
    token → successors, likeliest first, that come with the engine. `engines`: where engines that draft for it are
    loaded; None where there is no verifier to draft for. `persistent`: successors of the user's earlier sequences.
    `draft_head`: the one that the engine has.
    `slot`: where the sequence that is drafted for has its cache positions; `committed`: how many, None where nobody
    tells. `prediction`: what its answer will resemble.
    """

    vocab_size: int
    trees: bool
    tells_successors: bool
    warm: Mapping[int, Sequence[int]]
    engines: DraftEngines | None = None
    persistent: PersistentSuccessors | None = None
    draft_head: DraftHeadCache | None = None
    slot: Callable[[], int] = lambda: 0
    committed: Callable[[], int] | None = None
    prediction: PredictedAnswer | None = None


# What follows the name and a colon ("" for nothing) and the verifier → a drafter for one sequence.
Factory = Callable[[str, VerifierProfile], Drafter]
DrafterOption = Drafter | str | Sequence[Drafter | str]


def _prompt_lookup(argument: str, target: VerifierProfile) -> Drafter:  # noqa: ARG001 - the form of `Factory`
    if not argument:
        return PromptLookup()
    sizes = _SIZES.fullmatch(argument)
    if sizes is None:
        raise GenerationError(
            f"drafter 'prompt-lookup:{argument}' came; the shortest and the longest n-gram were expected, as in "
            "prompt-lookup:1-3"
        )
    return PromptLookup(min_ngram=int(sizes[1]), max_ngram=int(sizes[2]))


def _suffix(argument: str, target: VerifierProfile) -> Drafter:
    _refuse_argument("suffix", argument)
    return Suffix(branches=_SUFFIX_BRANCHES if target.trees else 1)


def _prediction(argument: str, target: VerifierProfile) -> Drafter:
    _refuse_argument(_PREDICTION, argument)
    if target.prediction is None:
        raise GenerationError(
            "drafter 'prediction' follows a text that the answer will resemble: give it as prediction"
        )
    return Prediction(target.prediction, trees=target.trees)


def _recycling(argument: str, target: VerifierProfile) -> Drafter:
    if argument not in ("", _KEEPS):
        raise GenerationError(f"drafter 'recycling:{argument}' came; 'recycling' or 'recycling:{_KEEPS}' was expected")
    if not target.tells_successors:
        raise GenerationError(
            "drafter 'recycling' needs the verifier's likeliest tokens, and this engine's graph does not tell them: "
            "build it again with this version"
        )
    if argument and target.persistent is None:
        raise GenerationError(
            "drafter 'recycling:kept' keeps what an engine saw, and there is none here: take 'recycling'"
        )
    return Recycling(
        branches=_RECYCLING_BRANCHES if target.trees else 1,
        warm=target.warm,
        persistent=target.persistent if argument else None,
    )


def _eagle(argument: str, target: VerifierProfile) -> Drafter:
    _refuse_argument(HeadDrafter.name, argument)
    if target.draft_head is None:
        raise GenerationError(
            "drafter 'eagle' is a draft head, and this engine has none, or none that these kernels run: "
            "python -m export add-head DIR HEAD adds one, for native kernels, and compiling DIR again for cuda"
        )
    return HeadDrafter(target.draft_head, trees=target.trees, slot=target.slot)


def _model(argument: str, target: VerifierProfile) -> Drafter:
    return EngineDrafter(
        _open_engine("model", argument, target), f"model:{argument}", target.vocab_size, slot=target.slot
    )


def _self(argument: str, target: VerifierProfile) -> Drafter:
    if argument:
        engine = _open_engine("self", argument, target, shares_cache=True)
        return EngineDrafter(
            engine, f"self:{argument}", target.vocab_size, slot=target.slot, committed=target.committed
        )
    if target.engines is None:
        raise GenerationError("drafter 'self' is a second graph of the verifier's, and there is no engine here")
    own = target.engines.open_own()
    return EngineDrafter(own, "self", target.vocab_size, slot=target.slot, committed=target.committed)


def _hierarchical(argument: str, target: VerifierProfile) -> Drafter:
    directory, plus, below = argument.rpartition("+")
    if not plus or Path(argument).is_dir():
        directory, plus = argument, ""
    engine = _open_engine("hierarchical", directory, target)
    otherwise: Drafter
    if plus:
        smaller = _open_engine("hierarchical", below, target)
        otherwise = EngineDrafter(smaller, f"model:{below}", engine.vocab_size, slot=target.slot)
    else:
        otherwise = Recycling(branches=_INNER_BRANCHES if engine.takes_trees else 1, warm=engine.warm)
    inner = InnerDrafts(otherwise)
    return EngineDrafter(engine, f"hierarchical:{argument}", target.vocab_size, inner=inner, slot=target.slot)


def _open_engine(name: str, argument: str, target: VerifierProfile, *, shares_cache: bool = False) -> DraftEngine:
    if not argument:
        raise GenerationError(f"drafter {name!r} needs an engine directory after a colon, as in {name}:DIR")
    if target.engines is None:
        raise GenerationError(
            f"drafter '{name}:{argument}' is compared with the verifier, and there is no engine directory of it here"
        )
    return target.engines.open(Path(argument), shares_cache=shares_cache)


_OWN: dict[str, Factory] = {
    "prompt-lookup": _prompt_lookup,
    "suffix": _suffix,
    "recycling": _recycling,
    "prediction": _prediction,
    HeadDrafter.name: _eagle,
    "model": _model,
    "self": _self,
    "hierarchical": _hierarchical,
}


@cache
def _installed() -> dict[str, EntryPoint]:
    """Those of other packages; a name of ours stays ours."""
    return {one.name: one for one in entry_points(group=ENTRY_POINTS) if one.name not in (*_OWN, NONE, AUTO)}


def _made_by(entry: EntryPoint, argument: str, target: VerifierProfile) -> Drafter:
    """Another package's drafter; its mistakes are named as its own."""
    try:
        made: object = entry.load()(argument, target)
    except QuasarError:
        raise
    except Exception as error:  # whatever a package raises
        raise GenerationError(
            f"drafter {entry.name!r}, of the package that registers {entry.value!r}, cannot be made: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, Drafter):
        raise GenerationError(f"drafter {entry.name!r} is made as {type(made).__name__}, which has no propose()")
    return made


def known_names() -> list[str]:
    """Every name that there is."""
    return [AUTO, NONE, *_OWN, *_installed()]


def names_alone(target: VerifierProfile | None = None) -> list[str]:
    """Those that load no engine: who may choose a drafter, and not what a process holds, chooses among these.

    With a `target`, those that it can have.
    """
    lacks = set(_LOAD_ENGINES)
    if target is not None and target.draft_head is None:
        lacks.add(HeadDrafter.name)
    if target is not None and not target.tells_successors:
        lacks.add("recycling")
    return [name for name in known_names() if name not in lacks]


def make_drafters(asked: DrafterOption, target: VerifierProfile) -> list[Drafter]:
    """The drafters of one sequence: an empty list for "none"; one that follows the prediction, where there is one.

    Args:
        asked: a drafter, a name (with ":" and an argument where it takes one), several names with commas between them,
            or a list of these. A name that comes twice counts once.
        target: what they draft for.

    Raises:
        GenerationError: an unknown name, or a drafter that this engine cannot have.
    """
    parts: list[Drafter | str] = []
    for one in as_list(asked):
        if isinstance(one, str):
            parts += [part.strip() for part in one.split(",")]
        else:
            parts.append(one)
    if not parts:
        raise GenerationError("drafter is an empty list; one name or drafter was expected, or 'none'")
    if NONE in parts:
        if len(parts) > 1:
            raise GenerationError("drafter 'none' stands beside others; it goes alone")
        if target.prediction is not None:
            raise GenerationError(
                "prediction came with the drafter 'none', which drafts nothing: pass one or the other"
            )
        return []
    if target.prediction is not None and _PREDICTION not in parts:
        # First, so that what it proposes counts as its own.
        parts.insert(0, _PREDICTION)
    drafters: list[Drafter] = []
    made: set[str] = set()
    for part in parts:
        if not isinstance(part, str):
            drafters.append(part)
            continue
        # Who is named twice, or by `auto` as well, drafts once: the sequence has one place in a head's cache.
        for name in _of_auto(target) if part == AUTO else [part.removesuffix(":")]:
            if name not in made:
                made.add(name)
                drafters.append(_make(name, target))
    return drafters


def _of_auto(target: VerifierProfile) -> list[str]:
    """What `auto` stands for."""
    names = ["suffix", "recycling"] if target.tells_successors else ["suffix"]
    return [*names, HeadDrafter.name] if target.draft_head is not None else names


def as_list(asked: DrafterOption) -> list[Drafter | str]:
    """One, or several."""
    return list(asked) if isinstance(asked, Sequence) and not isinstance(asked, str) else [asked]


def _make(text: str, target: VerifierProfile) -> Drafter:
    name, _, argument = text.partition(":")
    if name in _OWN:
        return _OWN[name](argument, target)
    entry = _installed().get(name)
    if entry is None:
        close = difflib.get_close_matches(name, known_names(), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise GenerationError(f"unknown drafter {name!r}; known are {', '.join(known_names())}{hint}")
    return _made_by(entry, argument, target)


def _refuse_argument(name: str, argument: str) -> None:
    if argument:
        raise GenerationError(f"drafter '{name}:{argument}' came; {name!r} takes nothing after a colon")
