"""The application: an ingress that relays, and replicas that each have an engine."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quasar.errors import QuasarError
from serving.settings import ServerSettings

# Slots of a replica where nothing is said.
SLOTS = 16
# The ingress waits so much longer than a replica, whose requests it relays.
_INGRESS_MORE_SECONDS = 10.0
# Requests beside those that a replica has room for: they are refused there, in its words.
_REFUSED_AT_ONCE = 32
# Seconds in which replicas tell their metrics.
_PAGE_SECONDS = 10.0
# A request has a line of the replica's own.
_LOGGING = {"enable_access_log": False}
_INGRESS, _REPLICA = "Ingress", "Engine"


def app(
    engine_dir: str | Path,
    *,
    settings: ServerSettings | None = None,
    api_key_file: str | Path | None = None,
    replicas: tuple[int, int] = (1, 1),
    slots: int = SLOTS,
    threads: int = 1,
    gpus: float = 0.0,
    backend: str | None = None,
    kernels: str | None = None,
    prefix_cache: str = "salted",
    ingresses: int = 1,
    revision: str = "",
) -> Any:
    """An application of Ray Serve, for `ray.serve.run`.

    Args:
        engine_dir: an engine directory, at this path on every machine of the cluster.
        settings: of each replica's server, without keys.
        api_key_file: keys, one a line, at this path on every machine; each replica reads it.
        replicas: at least, at most. Between them Ray goes by how many requests run or wait for each: as many as slots.
        slots: answers that share a replica's passes.
        threads: of a replica, and the CPUs that Ray sets aside for it.
        gpus: GPUs that Ray sets aside for a replica; back ends for GPUs see no other.
        backend, kernels, prefix_cache: as `runtime.load` has them.
        ingresses: processes that read requests and pass answers on.
        revision: any text; where it differs from the running application's, replicas are replaced one after the other.

    Raises:
        QuasarError: Ray is not installed, or a value that cannot be.
    """
    serve = _ray_serve()
    from serving.ray.replica import EngineReplica, EngineSettings  # need Ray's extra and the server's

    settings = settings or ServerSettings()
    if settings.keys.asked_for:
        raise QuasarError("settings hold keys, which would travel through the cluster: give api_key_file")
    if not 1 <= replicas[0] <= replicas[1]:
        raise QuasarError(f"replicas are {replicas[0]} to {replicas[1]}; 1 or more, the smaller first, were expected")
    for name, value in (("slots", slots), ("threads", threads), ("ingresses", ingresses)):
        if value < 1:
            raise QuasarError(f"{name} is {value}; 1 or more was expected")
    loading = EngineSettings(
        directory=str(Path(engine_dir).absolute()),
        slots=slots,
        threads=threads,
        backend=backend,
        kernels=kernels,
        prefix_cache=prefix_cache,
        api_key_file=None if api_key_file is None else str(Path(api_key_file).absolute()),
        revision=revision,
    )
    room = slots + settings.queue_limit + _REFUSED_AT_ONCE
    engine = serve.deployment(
        EngineReplica,
        name=_REPLICA,
        **_scale(replicas, slots),
        max_ongoing_requests=room,
        # What waits for a replica beside that has not been read by any.
        max_queued_requests=room,
        request_router_config=_router_config(slots),
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
        logging_config=_LOGGING,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=10,
        health_check_timeout_s=30,
        # A directory that cannot be loaded is not tried twenty times.
        max_constructor_retry_count=3,
    ).bind(loading, settings)
    ingress = serve.deployment(
        serve.ingress(_relay_builder(settings.max_body_bytes, prefix_cache))(),
        name=_INGRESS,
        num_replicas=ingresses,
        # Those of all replicas, and as many that wait or are refused.
        max_ongoing_requests=2 * room * replicas[1],
        ray_actor_options={"num_cpus": 0},
        logging_config=_LOGGING,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain_seconds + _INGRESS_MORE_SECONDS,
    )
    return ingress.bind(engine)


def from_config(args: Mapping[str, Any]) -> Any:
    """`app` for configuration files of Ray Serve and `serve run`: `import_path: serving.ray:from_config`.

    Args:
        args: those of `app`, and fields of `ServerSettings` beside them; `replicas` as "MIN-MAX" or a number.
    """
    given = dict(args)
    if "engine_dir" not in given:
        raise QuasarError("args lack engine_dir: an engine directory was expected")
    names = {one.name for one in dataclasses.fields(ServerSettings)} - {"keys"}
    try:
        settings = ServerSettings(**{name: given.pop(name) for name in names & given.keys()})
        if "replicas" in given:
            given["replicas"] = replica_range(str(given["replicas"]))
        return app(given.pop("engine_dir"), settings=settings, **given)
    except TypeError as error:
        raise QuasarError(f"args cannot be honoured: {error}") from None


def replica_range(text: str) -> tuple[int, int]:
    """At least and at most, of "MIN-MAX" or "N"; raises `QuasarError` for other text."""
    least, _, most = text.partition("-")
    if not least.isdecimal() or not (most or least).isdecimal():
        raise QuasarError(f"replicas are {text[:40]!r}; MIN-MAX or a number was expected, for example 1-4")
    return int(least), int(most or least)


def _scale(replicas: tuple[int, int], slots: int) -> dict[str, Any]:
    least, most = replicas
    if least == most:
        return {"num_replicas": least}
    return {"autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": slots}}


def _router_config(slots: int) -> Any:
    from ray.serve.config import RequestRouterConfig  # an extra

    return RequestRouterConfig(
        request_router_class="serving.ray.router:AffinityRouter", request_router_kwargs={"slots": slots}
    )


def _relay_builder(max_body_bytes: int, prefix_cache: str) -> Any:
    """A function that makes the ingress's ASGI application, in the ingress's process."""

    def build() -> Any:
        from ray import serve  # the ingress's own

        # Needed in its process alone.
        from serving.ray.failures import failure_of
        from serving.ray.relay import Relay, Replicas

        handle = serve.get_deployment_handle(_REPLICA)
        streaming = handle.options(stream=True)

        async def expositions() -> Any:
            found = await handle.broadcast("exposition").results_async(timeout_s=_PAGE_SECONDS, return_exceptions=True)
            # A replica that is on its way out has none.
            return [page for page in found if isinstance(page, bytes)]

        replicas = Replicas(answer=streaming.answer.remote, expositions=expositions, failure=failure_of)
        return Relay(replicas, max_body_bytes=max_body_bytes, prefix_cache=prefix_cache)

    return build


def _ray_serve() -> Any:
    """Ray Serve; raises `QuasarError` where it is not installed."""
    try:
        from ray import serve  # an extra
    except ModuleNotFoundError as error:
        raise QuasarError(f"{error.name} is not installed: run pip install 'quasar-verifier[serve,ray]'") from None
    return serve
