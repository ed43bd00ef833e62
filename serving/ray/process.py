"""`quasar serve DIR --ray`: the application in a cluster, for as long as the command runs."""

import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.directory import open_directory
from quasar.errors import QuasarError
from serving.ray.application import SLOTS, app, replica_range
from serving.settings import LOOPBACK, ServerSettings

_NAME = "quasar"
# Bytes of Ray's object store: what is passed here is small, and Ray would take a third of the memory.
_OBJECT_STORE = 100 * 2**20
# Back ends that run on a GPU.
_GPU_BACKENDS = ("cuda", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where the application runs.

    `address`: of a cluster; None: one is started on this machine, and ends with the command. `host`, `port`: of HTTP.
    """

    address: str | None
    host: str
    port: int


def serve_on_ray(
    directory: Path,
    settings: ServerSettings,
    cluster: Cluster,
    *,
    api_key_file: Path | None,
    replicas: str,
    slots: int | None,
    threads: int,
    backend: str | None,
    kernels: str | None,
    prefix_cache: str,
) -> None:
    """Serve until SIGTERM or SIGINT, and then until the requests that run have ended, or time is up.

    Raises `QuasarError` for what cannot be served.
    """
    least, most = replica_range(replicas)
    if cluster.port == 0:
        raise QuasarError("--port 0 is not for --ray: name a port")
    name = settings.name or str(open_directory(directory).manifest.model["name"])
    threads = threads or 1
    # Every line of every replica's log, as it was written.
    for variable in ("RAY_DEDUP_LOGS", "RAY_COLOR_PREFIX"):
        os.environ.setdefault(variable, "0")
    application = app(
        directory,
        settings=settings,
        api_key_file=api_key_file,
        replicas=(least, most),
        slots=slots or SLOTS,
        threads=threads,
        gpus=1.0 if backend in _GPU_BACKENDS else 0.0,
        backend=backend,
        kernels=kernels,
        prefix_cache=prefix_cache,
    )
    import ray  # an extra; it reads its variables when it is imported
    from ray import serve

    told = threading.Event()
    _connect(ray, cluster, cpus=most * threads)
    # After Ray's own.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    try:
        serve.start(http_options={"host": cluster.host, "port": cluster.port})
        try:
            serve.run(application, name=_NAME, route_prefix="/")
        except RuntimeError as error:
            raise QuasarError(f"Ray Serve did not start the application: {error}") from None
        print(f"{name} is served at http://{cluster.host}:{cluster.port}", flush=True)
        if cluster.host not in LOOPBACK and api_key_file is None:
            print(f"listening at {cluster.host} without keys: whoever reaches it may ask (--api-key-file)", flush=True)
        while not told.wait(1.0):
            continue
    finally:
        serve.delete(_NAME)
        if cluster.address is None:
            serve.shutdown()
        ray.shutdown()


def _connect(ray: Any, cluster: Cluster, *, cpus: int) -> None:
    if cluster.address is not None:
        try:
            ray.init(address=cluster.address)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise QuasarError(f"no Ray cluster at {cluster.address} ({error}): check --ray-address") from None
        return
    # "local": a cluster of its own, whatever RAY_ADDRESS says.
    ray.init(
        address="local",
        num_cpus=max(cpus, os.cpu_count() or 1),
        object_store_memory=_OBJECT_STORE,
        include_dashboard=False,
    )
