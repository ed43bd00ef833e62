"""The command that serves.

What a command runs is imported when it runs, so that its help answers at once.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from quasar.cli import new_app
from runtime.cli_options import Backend, Directory, Kernels, Threads

app = new_app()


@app.callback()
def _commands() -> None:
    """Serve engines over HTTP."""


@app.command()
def serve(
    directory: Directory,
    host: Annotated[
        str, typer.Option(help="The address to listen at; without keys, others than loopback get a warning.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one; the line that is printed tells it.")] = 8000,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="The model's name in the API (default: the engine's).")
    ] = "",
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keys, one a line: only who has one may ask.", show_default=False),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Answers that share passes (default: what memory allows, 16).", show_default=False
        ),
    ] = None,
    queue_limit: Annotated[int, typer.Option(metavar="N", help="Answers that may wait beside them.")] = 64,
    max_tokens_limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="New tokens that a request may ask for, at most.", show_default=False),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", help="Seconds that a request may take.", show_default=False)
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(metavar="N", help="Of a request.")] = 4 * 2**20,
    drain_seconds: Annotated[
        float, typer.Option(metavar="S", help="How long requests go on after SIGTERM or Ctrl-C.")
    ] = 30.0,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Web pages of this origin may ask; may be given again.", show_default=False
        ),
    ] = None,
    no_page: Annotated[bool, typer.Option("--no-page", help="Without the page at /.")] = False,
    prefix_cache: Annotated[
        str, typer.Option(help="Whose positions may serve a prompt: salted, shared or off.")
    ] = "salted",
    tool_format: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="How answers call functions: hermes or llama3-json (default: as the chat template teaches).",
            show_default=False,
        ),
    ] = "",
    backend: Backend = None,
    kernels: Kernels = None,
    threads: Threads = 0,
    ray: Annotated[bool, typer.Option("--ray", help="Serve with replicas of the engine, by Ray Serve.")] = False,
    replicas: Annotated[
        str | None,
        typer.Option(metavar="MIN-MAX", help="With --ray: how many (default: 1).", show_default=False),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="With --ray: of a cluster (default: one is started here).", show_default=False
        ),
    ] = None,
) -> None:
    """Serve DIR over HTTP as OpenAI's API: chats, completions, streams, metrics."""
    import runtime
    from quasar.errors import QuasarError
    from serving.keys import Keys, read_keys

    try:
        from serving.server import bind, serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "prometheus_client", "h11", "anyio"):
            raise
        raise QuasarError(f"{error.name} is not installed: run pip install 'quasar-verifier[serve]'") from None
    from serving.settings import ServerSettings

    keys = Keys() if api_key_file is None else read_keys(api_key_file)
    settings = ServerSettings(
        name=name,
        queue_limit=queue_limit,
        max_tokens_limit=max_tokens_limit,
        max_body_bytes=max_body_bytes,
        timeout=timeout,
        drain_seconds=drain_seconds,
        tool_format=tool_format,
        cors_origins=tuple(cors_origin or ()),
        page=not no_page,
        keys=keys,
    )
    if ray:
        from serving.ray.process import Cluster, serve_on_ray

        serve_on_ray(
            directory,
            dataclasses.replace(settings, keys=Keys()),
            Cluster(address=ray_address, host=host, port=port),
            api_key_file=api_key_file,
            replicas=replicas or "1",
            slots=slots,
            threads=threads,
            backend=backend,
            kernels=kernels,
            prefix_cache=prefix_cache,
        )
        return
    if replicas is not None or ray_address is not None:
        raise QuasarError("--replicas and --ray-address are for --ray: add it, or leave them out")
    with (
        bind(host, port) as bound,
        runtime.load(
            directory,
            backend=backend,
            kernels=kernels,
            threads=threads,
            max_sequences=slots,
            # It is checked there.
            prefix_cache=prefix_cache,  # type: ignore[arg-type]
        ) as engine,
    ):
        engine.warmup()
        serve(engine, settings, bound, host=host)
