"""The options of a generation on command lines: defined once, shown by every command that generates."""

import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quasar.checkpoints.checkpoint_text import SAMPLING_DEFAULTS
from quasar.errors import GenerationError

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
        help="onnxruntime, tensorrt or tensorrt-rtx (default: TensorRT where DIR has a plan for this GPU).",
        show_default=False,
    ),
]
Kernels = Annotated[
    str | None,
    typer.Option(
        "--kernels", help="On ONNX Runtime: native or stock (default: native if possible).", show_default=False
    ),
]
DrafterName = Annotated[
    str,
    typer.Option(
        "--drafter",
        metavar="NAME[,NAME]",
        help="auto, none, prompt-lookup[:MIN-MAX], suffix, recycling[:kept], model:DIR, self:DIR, hierarchical:DIR; of "
        "several, what pays is taken round by round.",
    ),
]
DraftTokens = Annotated[
    int | None,
    typer.Option(
        "--num-draft-tokens",
        metavar="K",
        help="Drafts per round, at most; one drafter then drafts up to K every round (default: what pays).",
        show_default=False,
    ),
]
# Name → type and help, and the default. Lists are written `--stop A B`.
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "max_new_tokens": (Annotated[int, typer.Option("--max-new-tokens", metavar="N")], 256),
    "min_new_tokens": (
        Annotated[int, typer.Option("--min-new-tokens", metavar="N", help="No end of the text before so many.")],
        0,
    ),
    "temperature": (
        Annotated[float, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token.")],
        0.0,
    ),
    "top_k": (Annotated[int, typer.Option("--top-k", metavar="N", help="Only the N likeliest tokens; 0: all.")], 0),
    "top_p": (
        Annotated[float, typer.Option("--top-p", metavar="P", help="Only the likeliest tokens that make up P.")],
        1.0,
    ),
    "min_p": (
        Annotated[float, typer.Option("--min-p", metavar="P", help="Only tokens with P times the likeliest one's.")],
        0.0,
    ),
    "repetition_penalty": (
        Annotated[float, typer.Option("--repetition-penalty", metavar="X", help="Of tokens in prompt or text.")],
        1.0,
    ),
    "presence_penalty": (
        Annotated[float, typer.Option("--presence-penalty", metavar="X", help="Of tokens in the text.")],
        0.0,
    ),
    "frequency_penalty": (
        Annotated[float, typer.Option("--frequency-penalty", metavar="X", help="The same, times how often.")],
        0.0,
    ),
    "logit_bias": (
        Annotated[
            list[str] | None,
            typer.Option("--logit-bias", metavar="ID=X …", help="Added to these tokens' logits.", show_default=False),
        ],
        None,
    ),
    "seed": (
        Annotated[
            int | None,
            typer.Option("--seed", metavar="N", help="The same seed draws the same text.", show_default=False),
        ],
        None,
    ),
    "stop": (
        Annotated[
            list[str] | None,
            typer.Option("--stop", metavar="TEXT", help="Ends the text; may be given again.", show_default=False),
        ],
        None,
    ),
    "stop_token_ids": (
        Annotated[
            list[int] | None,
            typer.Option("--stop-token-ids", metavar="ID …", help="End the text.", show_default=False),
        ],
        None,
    ),
    "ignore_eos": (Annotated[bool, typer.Option("--ignore-eos", help="Go on behind the model's end tokens.")], False),
    "chat_template_kwargs": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--template-arg",
                metavar="KEY=VALUE",
                help="An argument of the chat template, as JSON or text: enable_thinking=false.",
                show_default=False,
            ),
        ],
        None,
    ),
    "template": (
        Annotated[
            str,
            typer.Option(
                "--chat-template", metavar="NAME", help="One of the engine's named templates.", show_default=False
            ),
        ],
        "",
    ),
    "continue_final_message": (
        Annotated[bool, typer.Option("--continue-final-message", help="Go on with an assistant's message at the end.")],
        False,
    ),
    "parse_special": (
        Annotated[bool, typer.Option("--parse-special", help="Special tokens in messages are control tokens.")],
        False,
    ),
    "date": (
        Annotated[
            str | None,
            typer.Option("--date", metavar="YYYY-MM-DD", help="The day that templates are told.", show_default=False),
        ],
        None,
    ),
    "model_defaults": (
        Annotated[
            bool,
            typer.Option("--model-defaults", help="Sample as the checkpoint suggests (default: greedy)."),
        ],
        False,
    ),
    "deadline": (
        Annotated[
            float | None,
            typer.Option("--deadline", metavar="S", help="Seconds after which the text ends.", show_default=False),
        ],
        None,
    ),
    "drafter": (DrafterName, "auto"),
    "num_draft_tokens": (DraftTokens, None),
}
# For `quasar.cli.command_of_lists`: what continues a list.
LISTS = {"logit_bias": r"\d+=.+", "stop_token_ids": r"\d+"}


def generation_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every option above; it takes them as `options`, ready for `Engine.generate`.

    Args:
        defaults: other defaults than those above.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        shown = [one for one in own.parameters.values() if one.name != "options"]
        for name, (annotation, default) in _OPTIONS.items():
            shown.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=defaults.get(name, default),
                    annotation=annotation,
                )
            )

        @functools.wraps(command)
        def run(context: typer.Context, **values: Any) -> None:
            options = {name: values.pop(name) for name in _OPTIONS}
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

    if any(part.strip().startswith(("model:", "self:", "hierarchical:")) for part in drafter.split(",")):
        runtime.share_threads(threads)
    return runtime.load(directory, backend=backend, kernels=kernels, threads=threads)


def to_options(values: Mapping[str, Any], *, given: Collection[str] = ()) -> dict[str, Any]:
    """What `Engine.generate` takes, from what was typed; raises `GenerationError` naming what cannot be read.

    `given`: the options that were typed; with --model-defaults the checkpoint's values stand for the others.
    """
    options = dict(values)
    options["chat_template_kwargs"] = dict(_argument(one) for one in options["chat_template_kwargs"] or ()) or None
    options["chat_template"] = options.pop("template") or True
    if options.pop("model_defaults"):
        options = {name: value for name, value in options.items() if name not in SAMPLING_DEFAULTS or name in given}
        options["sampling"] = "model"
    options["logit_bias"] = dict(_bias(one) for one in options["logit_bias"] or ()) or None
    options["stop"] = tuple(options["stop"] or ())
    options["stop_token_ids"] = tuple(options["stop_token_ids"] or ())
    return options


def _given(context: typer.Context) -> set[str]:
    """Names of the options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _argument(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise GenerationError(f"--template-arg {text}: KEY=VALUE was expected, as in enable_thinking=false")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise GenerationError(f"--logit-bias {text}: ID=NUMBER was expected, as in 17=-2.5 or 17=-inf") from None


def read_tools(path: Path) -> list[Any]:
    """A JSON file of tool descriptions; raises `GenerationError` unless it holds a list."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise GenerationError(f"{path} cannot be read as JSON ({error}); a list of tools was expected") from None
    if not isinstance(value, list):
        raise GenerationError(f"{path} holds a {type(value).__name__}; a list of tools was expected")
    return value
