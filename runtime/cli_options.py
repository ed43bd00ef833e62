"""The options of a generation on command lines, made from their declarations.

What a command runs is imported when it runs, so that its help answers at once.
"""

import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quasar.checkpoints.checkpoint_text import SAMPLING_DEFAULTS
from quasar.errors import GenerationError
from runtime.generation_options import OPTIONS
from runtime.option_fields import metadata_of

if TYPE_CHECKING:
    from runtime.api import Engine

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="An engine directory.")]
Threads = Annotated[int, typer.Option("--threads", help="0 takes one per physical core.")]
Record = Annotated[
    Path | None,
    typer.Option(
        "--record",
        metavar="FILE",
        help="Write prompts, answers and likeliest tokens there, as ids, for simulate; a file is replaced.",
        show_default=False,
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="onnxruntime, cuda, tensorrt or tensorrt-rtx (default: one of the last three if DIR has it for this GPU).",
        show_default=False,
    ),
]
Kernels = Annotated[
    str | None,
    typer.Option(
        "--kernels", help="On ONNX Runtime: native or stock (default: native if possible).", show_default=False
    ),
]
_FLAGS = {one.name: flag for one in OPTIONS if (flag := metadata_of(one).flag) is not None}
# For `quasar.cli.command_of_lists`: what continues a list.
LISTS = {name: flag.continues for name, flag in _FLAGS.items() if flag.continues}


def _typer_option(name: str) -> Any:
    flag = _FLAGS[name]
    return typer.Option(
        flag.name or f"--{name.replace('_', '-')}",
        metavar=flag.metavar,
        help=flag.help,
        show_default=_default_of(name) not in (None, ""),
    )


def _default_of(name: str) -> Any:
    own = _FLAGS[name].default
    return next(one.default for one in OPTIONS if one.name == name) if own is None else own


DrafterName = Annotated[str, _typer_option("drafter")]
DraftTokens = Annotated[int | None, _typer_option("num_draft_tokens")]


def generation_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every option that has a `Flag`; it takes them as `options`, ready for `Engine.generate`.

    Args:
        defaults: other defaults than the options' own.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        shown = [one for one in own.parameters.values() if one.name != "options"]
        for name, flag in sorted(_FLAGS.items(), key=lambda item: item[1].rank):
            shown.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=defaults.get(name, _default_of(name)),
                    annotation=Annotated[flag.kind, _typer_option(name)],
                )
            )

        @functools.wraps(command)
        def run(context: typer.Context, **values: Any) -> None:
            options = {name: values.pop(name) for name in _FLAGS}
            command(**values, options=to_options(options, given=_given(context)))

        shown.append(inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        # typer asks for the optional parameters last, and for annotations beside the signature.
        shown.sort(key=lambda one: one.default is not inspect.Parameter.empty)
        run.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in shown]
        )
        run.__annotations__ = {one.name: one.annotation for one in shown} | {"return": None}
        return run

    return decorate


def load_engine(directory: Path, drafter: str, *, backend: str | None, kernels: str | None, threads: int) -> "Engine":
    """The engine of a command. With a drafter that is an engine, both share one thread pool."""
    import runtime

    if any(part.strip().partition(":")[0] in ("model", "self", "hierarchical") for part in drafter.split(",")):
        runtime.share_threads(threads)
    return runtime.load(directory, backend=backend, kernels=kernels, threads=threads)


def to_options(values: Mapping[str, Any], *, given: Collection[str] = ()) -> dict[str, Any]:
    """What `Engine.generate` takes, from what was typed; raises `GenerationError` naming what cannot be read.

    `given`: the options that were typed; with --model-defaults the checkpoint's values stand for the others.
    """
    options = {name: _FLAGS[name].read(value) for name, value in values.items()}
    if options["sampling"] == "model":
        options = {name: value for name, value in options.items() if name not in SAMPLING_DEFAULTS or name in given}
    return options


def _given(context: typer.Context) -> set[str]:
    """Names of the options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def read_tools(path: Path) -> list[Any]:
    """A JSON file of tool descriptions; raises `GenerationError` unless it holds a list."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise GenerationError(f"{path} cannot be read as JSON ({error}); a list of tools was expected") from None
    if not isinstance(value, list):
        raise GenerationError(f"{path} holds a {type(value).__name__}; a list of tools was expected")
    return value
