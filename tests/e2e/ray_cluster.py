"""A Ray of one machine, on loopback only, that serves a configuration file and takes it in again on SIGHUP.

In a process of its own, `python -m tests.e2e.ray_cluster FOLDER CONFIG`: what Ray does to a process (signals,
threads, warnings) stays out of the tests', and can be ended whatever state it is in.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.test_server import ROOT, Seen

CPUS = 8  # for Ray to hand out, however few there are
OBJECT_STORE_BYTES = 80_000_000
START_SECONDS = 300.0  # on a busy machine an import of torch alone takes half a minute
END_SECONDS = 15.0
REPLICA = "ray::ServeReplica"

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # of no other meaning on Linux than this: loopback instead of a network
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "service.ray_serve.proxy:middlewares",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Cluster:
    process: subprocess.Popen[bytes]  # leads the session that all of the cluster's are in
    folder: Path  # short, because paths of Unix sockets are
    config: dict[str, Any]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config['http_options']['port']}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.config['grpc_options']['port']}"

    def replicas(self) -> list[int]:
        """The processes that serve, or will when they have loaded."""
        return [pid for pid, command in self._processes() if command.startswith(REPLICA)]

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", timeout=30).text

    def ready(self) -> set[str]:
        """Names of the replicas that take requests, as any of them shows it."""
        return set(re.findall(r'^rdt_ready\{replica="(\w+)"\} 1', self.metrics(), re.MULTILINE))

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def deploy(self) -> None:
        """Take in `config` as it is now."""
        (self.folder / "serve.yaml").write_text(yaml.safe_dump(self.config))
        self.process.send_signal(signal.SIGHUP)

    def wait_for(self, look: Callable[[], Seen | None], seconds: float = START_SECONDS) -> Seen:
        """What `look` finds, once it finds something. Fails with the end of the cluster's log."""
        give_up = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < give_up:
            with suppress(httpx.HTTPError):
                if (seen := look()) is not None:
                    return seen
            time.sleep(0.1)
        pytest.fail("\n".join(self.log().splitlines()[-60:]))

    def end(self) -> None:
        """Ask nicely, then kill whatever of it is left."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        for pid, _ in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _processes(self) -> Iterator[tuple[int, str]]:
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.getsid(int(entry.name)) == self.process.pid:
                    yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()


@contextmanager
def cluster(config: dict[str, Any]) -> Iterator[Cluster]:
    """Ready to be asked; gone at the end with all its processes, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="rdt-ray-", dir="/tmp"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RDT_", "RAY_"))}
    own = {**ENVIRONMENT, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.ray_cluster", str(folder / "ray"), str(path)],
            cwd=ROOT, env={**environment, **own}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    running = Cluster(process, folder, config)
    try:
        running.wait_for(lambda: httpx.get(f"{running.url}/health/ready", timeout=10).is_success or None)
        yield running
    finally:
        running.end()
        shutil.rmtree(folder, ignore_errors=True)


def main(folder: str, config: str) -> None:
    import ray  # noqa: PLC0415 - not in the tests' process
    from ray import serve  # noqa: PLC0415
    from ray.serve.config import gRPCOptions  # noqa: PLC0415
    from ray.serve.context import _get_global_client  # noqa: PLC0415
    from ray.serve.schema import ServeDeploySchema  # noqa: PLC0415

    ray.init(
        address="local",
        namespace="serve",
        num_cpus=CPUS,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        _temp_dir=folder,
    )

    def read() -> ServeDeploySchema:
        return ServeDeploySchema.model_validate(yaml.safe_load(Path(config).read_text()))

    schema = read()
    serve.start(
        proxy_location=schema.proxy_location,
        http_options=schema.http_options.model_dump(),
        grpc_options=gRPCOptions(**schema.grpc_options.model_dump()),
    )
    client = _get_global_client()
    signals = {signal.SIGHUP, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # to be waited for, not handled
    client.deploy_apps(schema, _blocking=False)
    while signal.sigwait(signals) == signal.SIGHUP:
        client.deploy_apps(read(), _blocking=False)
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
