"""The command that looks at the machine: env.

What a command runs is imported when it runs, so that its help answers at once.
"""

from typing import Annotated

import typer

from quasar.cli import emit_json, new_app

app = new_app()


@app.command()
def env(json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Show versions, the CPU and its quota, the kernels that would run and why, and the GPU: for reports of faults."""
    from evaluation.environment import read_environment

    environment = read_environment()
    if json:
        emit_json(environment.to_json())
        return
    lines = environment.lines()
    width = max(len(title) for title, _ in lines)
    for title, text in lines:
        print(f"{title:<{width}}  {text}")
