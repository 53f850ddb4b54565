"""`samssl serve`: replicas of Ray Serve segment, and the application of `samssl.serving` asks them.

The application runs in the command's own process, by uvicorn, and not behind Ray's HTTP proxy: that takes in
an upload as fast as it comes, whether or not anybody has counted it. Ray is one of the command's own, on the
loopback alone and without its dashboard, and ends with it. So does the folder of uploads.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn

from samssl.bundle import load_segmenter, read_bundle
from samssl.config import UserError
from samssl.inference import LoadedBundle, check_members
from samssl.serving.app import make_app
from samssl.serving.segmenting import Answer, Segmenter
from samssl.serving.settings import ServeConfig
from samssl.serving.uploads import Refusal

LOOPBACK = "127.0.0.1"
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Keeps Ray on the loopback, as it is by default on these other systems; Ray reads it when it is imported."""
ENDING_S = 2
"""How long requests may go on after Ctrl-C."""


def run_serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        UserError: a bundle cannot be used, the port is taken, or there are too few GPUs.
    """
    _check(config)
    if not config.local:
        print(
            f"serve: WARNING: {config.host} can be reached from other machines, and there is no "
            "authentication: whoever reaches the server can use it. Put a proxy before it that asks who they "
            "are.",
            flush=True,
        )
    with _listening(config) as listening, TemporaryDirectory(prefix="samssl_serve_") as folder:
        try:
            _answer_requests(config, _start(config, Path(folder)), listening, Path(folder))
        except KeyboardInterrupt:
            print("serve: ending", flush=True)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave Ray behind
            _end_ray()


def _check(config: ServeConfig) -> None:
    """Fail here, before Ray is started, and not in every replica."""
    if os.environ.get("RAY_ADDRESS"):
        raise UserError(
            "`samssl serve` joins no cluster: it starts a Ray of its own that nobody else reaches. Unset "
            "RAY_ADDRESS."
        )
    paths = _bundles(config)
    check_members(paths, [read_bundle(path) for path in paths])
    for path in paths:
        load_segmenter(path, config.base)


def _bundles(config: ServeConfig) -> list[Path]:
    return [config.bundle, *config.more_bundles]


def _listening(config: ServeConfig) -> socket.socket:
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise UserError(
            f"Nothing can listen on {config.host}, port {config.port}: {error.strerror}. Choose another "
            "`port` or `host`."
        ) from None


def _start(config: ServeConfig, folder: Path) -> Any:
    """Ray Serve's handle of the replicas, once these have the bundles in memory."""
    os.environ |= ON_LOOPBACK
    import ray
    from ray import serve
    from ray.serve.config import ProxyLocation
    from ray.serve.schema import LoggingConfig

    from samssl.cluster.tasks import start_ray

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    start_ray()
    if ray.util.get_node_ip_address() != LOOPBACK:
        raise UserError("Ray was started where other machines reach it. Run `samssl serve` by itself.")
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=quiet)
    threads = max(1, (os.cpu_count() or 1) // config.replicas)
    options: dict[str, Any] = {
        "num_replicas": config.replicas,
        "max_ongoing_requests": 1,  # each has one thread: what waits can then go to whichever is free first
        "ray_actor_options": {
            "num_cpus": 0,
            "num_gpus": _gpus(config, ray.cluster_resources().get("GPU", 0)),
        },
    }
    replicas = serve.deployment(**options)(Replica).bind(config, folder, threads)
    try:
        return serve.run(replicas, name="samssl", route_prefix=None, logging_config=quiet)
    except RuntimeError as error:
        raise UserError(f"The server did not start: {str(error).strip().splitlines()[-1]}") from error


class Replica:
    """The bundles in a process of their own."""

    def __init__(self, config: ServeConfig, folder: Path, threads: int) -> None:
        import torch

        _keep_to_loopback()
        torch.set_num_threads(threads)
        self.segmenter = Segmenter(LoadedBundle(_bundles(config), config.base), folder)

    async def segment(self, path: Path, settings: ServeConfig) -> Answer | tuple[int, str]:
        """The answer, or status and sentence of a refusal: what is raised here, Ray logs."""
        try:
            return await self.segmenter.segment(path, settings)
        except Refusal as refusal:
            return refusal.status, str(refusal)


def _end_ray() -> None:
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


def _keep_to_loopback() -> None:
    """Have Ray Serve open this replica's port, which it opens next, on the loopback and not everywhere."""
    import ray.serve._private.replica

    replica: Any = ray.serve._private.replica
    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(
        server, address.replace("[::]", LOOPBACK)
    )


def _answer_requests(config: ServeConfig, replicas: Any, listening: socket.socket, folder: Path) -> None:
    """Until a signal, which is raised again as `KeyboardInterrupt`."""

    async def segment(path: Path, settings: ServeConfig) -> Answer:
        asked = replicas.segment.remote(path, settings)
        try:
            answer = await asked
        except asyncio.CancelledError:
            asked.cancel()
            raise
        if isinstance(answer, tuple):
            raise Refusal(*answer)
        return answer

    app = make_app(segment, read_bundle(config.bundle).run_classes, config, folder)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=ENDING_S,
        )
    )
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"serve: http://{host}:{config.port} answers. Ctrl-C ends it.", flush=True)
    server.run(sockets=[listening])


def _gpus(config: ServeConfig, there: float) -> float:
    """GPUs of each replica."""
    if config.gpus is None:
        return float(there >= config.replicas)
    if config.gpus * config.replicas > there:
        raise UserError(
            f"{config.replicas} replicas with {config.gpus:g} GPUs each need more than the {there:g} of this "
            "machine. Change `replicas` or `gpus`."
        )
    return config.gpus
