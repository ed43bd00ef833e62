"""The frame of the command lines: one-line errors with exit code 2, progress on stderr, results on stdout."""

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from quasar.errors import QuasarError
from quasar.files import write_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from typer.core import TyperCommand

USER_ERROR = 2
# What the extra `build` brings; the runtime does without.
_BUILD_LIBRARIES = {
    *("torch", "transformers", "onnx", "onnx_ir", "safetensors", "ml_dtypes", "gguf", "huggingface_hub", "filelock"),
}


def new_app() -> typer.Typer:
    """Holds the commands of a module; `quasar.commands` makes programs of them. No decorated tracebacks."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def command_of_lists(**values: str) -> type["TyperCommand"]:
    """A command in which `--option a b c` stands for the option given three times.

    Args:
        values: option name, with underscores → the regular expression of a value. What does not match ends the list.
    """
    from typer.core import TyperCommand

    patterns = {f"--{name.replace('_', '-')}": re.compile(pattern) for name, pattern in values.items()}

    class Command(TyperCommand):
        """Writes the option before every value of its list."""

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            spread: list[str] = []
            option = ""
            for argument in args:
                if argument in patterns:
                    option = argument
                elif option and patterns[option].fullmatch(argument):
                    if spread[-1] != option:
                        spread.append(option)
                else:
                    option = ""
                spread.append(argument)
            return super().parse_args(ctx, spread)

    return Command


def run(app: Callable[[], object]) -> NoReturn:
    """Run a command group or a function, and end the process.

    A `QuasarError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character (LANG=C, cp1252) shows its code; the answer goes on.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except QuasarError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        # Typer answers it for commands; functions have no Typer.
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _BUILD_LIBRARIES:
            raise
        print(f"error: {error.name} is not installed: run pip install 'quasar-verifier[build]'", file=sys.stderr)
        sys.exit(USER_ERROR)
    except BrokenPipeError:
        # The reader of a pipe (`| head`) went away; Python would complain once more when it flushes at exit.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    sys.exit(0)


def console() -> "Console":
    """The console for people: stderr, so that stdout holds results alone."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def add_column(table: "Table", title: str, *, names: bool) -> None:
    """A column of names, which stay whole on a narrow screen, or of figures."""
    table.add_column(title, justify="left" if names else "right", no_wrap=names)


@contextmanager
def progress_steps(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr that leaves no trace; gives a function to call with the steps done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    out = console()
    with Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=out,
        transient=True,
        # Bars in a log file would be noise.
        disable=not out.is_terminal,
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)


def emit_json(value: Any, path: Path | None = None) -> None:
    """Print a value as JSON on stdout or, with a path, write it there."""
    if path is None:
        # What stdout cannot encode is written as JSON's own escapes.
        utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        print(json.dumps(value, indent=2, ensure_ascii=not utf8))
    elif path.exists() and not path.is_file():
        # A device or a pipe is written to, not replaced.
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        write_json(path.resolve(), value)


def check_output(path: Path | None) -> None:
    """Raise before the work is done if its result could not be written there."""
    if path is None:
        return
    if path.is_dir():
        raise QuasarError(f"{path} is a folder; a file to write was expected")
    if not path.absolute().parent.is_dir():
        raise QuasarError(f"{path.absolute().parent} does not exist: make the folder or choose another file")
