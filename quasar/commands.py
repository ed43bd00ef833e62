"""Every command of the project, in one table, and the programs that show it.

The table names modules as text, so that a program lists its commands without importing one of them. It is also why
`python -m runtime verify` can run a command of `evaluation`, a package that `runtime` may not import.
"""

import importlib
from dataclasses import dataclass
from typing import Any, NoReturn

import typer.main
from typer.core import TyperCommand, TyperGroup

from quasar.cli import run


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command: the Typer app `app` of `module` holds it under this name.

    `group`: the section of `quasar --help` that lists it. `programs`: the packages whose `python -m PACKAGE` has it;
    the console script `quasar` has all commands. `help`: the first paragraph of the command's docstring.
    """

    name: str
    module: str
    group: str
    programs: tuple[str, ...]
    help: str


COMMANDS = (
    Command(
        name="build",
        module="export.cli",
        group="Make",
        programs=("export",),
        help="Calibrate, quantize and export MODEL, then measure the engine on this machine.",
    ),
    Command(
        name="compile",
        module="export.cli",
        group="Make",
        programs=("export",),
        help="Add a GPU back end to an engine directory, from its own graph: no checkpoint, no torch.",
    ),
    Command(
        name="add-head",
        module="export.cli",
        group="Make",
        programs=("export",),
        help="Add a draft head to an engine directory, in place of one that it has: EAGLE, EAGLE-2 or EAGLE-3.",
    ),
    Command(
        name="inspect",
        module="export.cli",
        group="Make",
        programs=("export",),
        help="Show what an engine directory holds: model, precision, fidelity, row invariance, latencies, hashes.",
    ),
    Command(
        name="train-head",
        module="calibration.cli",
        group="Make",
        programs=("calibration",),
        help="Train an EAGLE draft head for DIR on text of its own verifier.",
    ),
    Command(
        name="list",
        module="export.cli",
        group="Make",
        programs=("export",),
        help="List the architectures that can be built: their names and models, their options, what is tested of each.",
    ),
    Command(
        name="generate",
        module="runtime.cli",
        group="Run",
        programs=("runtime",),
        help="Answer PROMPT, streaming the text.",
    ),
    Command(
        name="chat",
        module="runtime.cli",
        group="Run",
        programs=("runtime",),
        help="Talk to the model: lines in, answers out. Ctrl-C stops an answer.",
    ),
    Command(
        name="serve",
        module="serving.cli",
        group="Run",
        programs=("serving",),
        help="Serve DIR over HTTP as OpenAI's API: chats, completions, streams, metrics.",
    ),
    Command(
        name="verify",
        module="evaluation.cli_decoding",
        group="Measure",
        programs=("evaluation", "runtime"),
        help="Decode every prompt plainly and speculatively; exit code 1 if any token or length differs.",
    ),
    Command(
        name="bench",
        module="evaluation.cli_decoding",
        group="Measure",
        programs=("evaluation", "runtime"),
        help="Time {float, quantized} × {plain, speculative}, and fixed prompt lookup, interleaved prompt by prompt.",
    ),
    Command(
        name="accuracy",
        module="evaluation.cli_decoding",
        group="Measure",
        programs=("evaluation", "runtime"),
        help="Score greedy answers against references: maths by exact match, summaries by ROUGE-L, with 95 % "
        "intervals.",
    ),
    Command(
        name="simulate",
        module="evaluation.cli_decoding",
        group="Measure",
        programs=("evaluation", "runtime"),
        help="Replay recorded generations against a drafter: acceptance length and expected speed-up, without the "
        "verifier.",
    ),
    Command(
        name="report",
        module="evaluation.cli_fidelity",
        group="Measure",
        programs=("evaluation", "calibration"),
        help="KL, top-1 agreement and perplexity of an engine against its float model, and a page with the details.",
    ),
    Command(
        name="sweep",
        module="evaluation.cli_fidelity",
        group="Measure",
        programs=("evaluation", "calibration"),
        help="Fidelity against latency over a set of recipes, as a table and a plot.",
    ),
    Command(
        name="compare",
        module="evaluation.cli_passes",
        group="Measure",
        programs=("evaluation", "engines"),
        help="Feed one text to ONNX Runtime and TensorRT and compare keys, values and logits by layer, worst first.",
    ),
    Command(
        name="time",
        module="evaluation.cli_passes",
        group="Measure",
        programs=("evaluation", "engines"),
        help="Time whole verify passes, kernels alternating: medians, beside what memory bandwidth allows.",
    ),
    Command(
        name="roofline",
        module="evaluation.cli_roofline",
        group="Measure",
        programs=("evaluation",),
        help="Predict verify passes on GPUs from memory bandwidth and tensor rates: a model of limits, not a "
        "measurement.",
    ),
    Command(
        name="env",
        module="evaluation.cli_environment",
        group="Installation",
        programs=(),
        help="Show versions, the CPU and its quota, the kernels that would run and why, and the GPU: for reports of "
        "faults.",
    ),
)
# Program → what its --help begins with. `quasar` is the console script; the others are `python -m PACKAGE`.
PROGRAMS = {
    "quasar": "Speculative decoding with an INT8 verifier: make engines, run them, measure them.",
    "evaluation": "Measure engines: exactness, speed, fidelity, tasks, back ends.",
    "runtime": "Generate with a verifier engine, prove that speculation is exact, and measure it.",
    "calibration": "Measure how faithful a quantized verifier is to its float model, and train draft heads for it.",
    "engines": "Compare the back ends of an engine directory, and time its verify passes.",
    "serving": "Serve verifier engines over HTTP, as OpenAI's API.",
    "export": "Build INT8 verifier engines for speculative decoding, and look into them.",
}


def run_program(name: str) -> NoReturn:
    """Run a program to its end; see `quasar.cli.run` for errors and exit codes."""
    run(program(name))


def program(name: str) -> TyperGroup:
    """The command group of a program."""
    sections: dict[str, list[Command]] = {}
    for one in COMMANDS:
        if name == "quasar":
            sections.setdefault(one.group, []).append(one)
        elif name in one.programs:
            sections.setdefault("Commands", []).append(one)
    return _LazyGroup(sections, PROGRAMS[name])


def load_command(command: Command) -> Any:
    """Import a command: a `TyperCommand`."""
    app = importlib.import_module(command.module).app
    return typer.main.get_group(app).commands[command.name]


class _LazyGroup(TyperGroup):
    """Lists its commands from the table and imports the one that runs."""

    def __init__(self, sections: dict[str, list[Command]], help_text: str) -> None:
        self._table = {one.name: one for commands in sections.values() for one in commands}
        self._sections = sections
        # What --help and the suggestions after a typing error read.
        listed: dict[str, Any] = {one.name: TyperCommand(one.name, help=one.help) for one in self._table.values()}
        super().__init__(commands=listed, help=help_text, no_args_is_help=True, rich_markup_mode=None)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - the name that typer gives it
        return load_command(self._table[cmd_name]) if cmd_name in self._table else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - the name that typer gives it
        longest = max(map(len, self._table))
        for title, commands in self._sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    # 6: typer's own indentation and the space between the columns.
                    (one.name.ljust(longest), self.commands[one.name].get_short_help_str(formatter.width - 6 - longest))
                    for one in commands
                )
