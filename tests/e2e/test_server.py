"""A real server process with a tiny checkpoint, and a real client."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import grpc
import httpx
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from rdt_core import checkpoint
from service.client import Client, ProblemError
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb.denoiser_pb2_grpc import DenoiserStub

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0

Seen = TypeVar("Seen")

pytestmark = pytest.mark.e2e


@dataclass
class Server:
    process: subprocess.Popen[str]
    log: Path
    url: str = ""


@contextmanager
def server(log: Path, *flags: str, under: Sequence[str] = ()) -> Iterator[Server]:
    """`python -m service` on a free port, started by `under`; killed at the end if it still runs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RDT_")}
    with log.open("w") as file:
        process = subprocess.Popen(
            [*under, sys.executable, "-m", "service", "--http_port=0", "--grpc_port=0", "--threads=1", *flags],
            cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, stderr=file, stdout=file, text=True,
        )  # fmt: skip
    running = Server(process, log)
    try:
        yield running
    finally:
        process.kill()
        process.wait()


def wait_for_url(running: Server) -> str:
    """The address the server says it listens on."""
    return wait_for(running, lambda: _found(r"listening on (http://[\d.:]+)", running.log.read_text()))


def wait_for_grpc(running: Server) -> str:
    """The same of gRPC, without its scheme."""
    return wait_for(running, lambda: _found(r"listening on grpc://([\d.:]+)", running.log.read_text()))


def wait_until_ready(running: Server) -> Client:
    running.url = wait_for_url(running)
    client = Client(running.url)
    wait_for(running, lambda: client.ready() or None)
    return client


def wait_for(running: Server, look: Callable[[], Seen | None]) -> Seen:
    """What `look` finds, once it finds something. Fails with the server's log if it ends or takes too long."""
    give_up = time.monotonic() + START_SECONDS
    while running.process.poll() is None and time.monotonic() < give_up:
        if (seen := look()) is not None:
            return seen
        time.sleep(0.02)
    pytest.fail(running.log.read_text())


def test_a_life_from_start_to_sigterm(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """With reloads, which a hangup asks for."""
    path = Path(shutil.copy(tiny_checkpoint, tmp_path / "best_model.pt"))
    with server(tmp_path / "log", "--checkpoint", str(path), "--max_steps_limit", "1000000") as running:
        wait_for_url(running)
        running.process.send_signal(signal.SIGHUP)  # perhaps before there is anything to reload
        with wait_until_ready(running) as client, ThreadPoolExecutor(1) as thread:
            check_answers(client)
            assert 'rdt_requests_total{outcome="ok",transport="rest"} 1.0' in httpx.get(f"{running.url}/metrics").text

            first = client.model().digest
            held = checkpoint.read(path)
            checkpoint.save(path, replace(held, step=held.step + 1))
            running.process.send_signal(signal.SIGHUP)
            wait_for(running, lambda: client.model().digest != first or None)
            path.write_bytes(b"no checkpoint")
            running.process.send_signal(signal.SIGHUP)
            wait_for(running, lambda: "the checkpoint cannot be served: " in running.log.read_text() or None)
            check_answers(client)

            slow = thread.submit(client.denoise, "[MASK]", max_steps=1_000_000, threshold=0, timeout_ms=3000)
            wait_for(running, lambda: "rdt_live_requests 1.0" in httpx.get(f"{running.url}/metrics").text or None)
            running.process.send_signal(signal.SIGTERM)
            wait_for(running, lambda: httpx.get(f"{running.url}/health/ready").json()["status"] == "draining" or None)
            with Client(running.url) as late, pytest.raises(ProblemError, match="503"):
                late.denoise("a")
            assert slow.result(timeout=10).halt_reason == "deadline", "a request under way is answered"
        assert running.process.wait(timeout=10) == 0


def test_more_connections_than_files_at_the_start(tiny_checkpoint: Path, tmp_path: Path) -> None:
    few = ("sh", "-c", 'ulimit -Sn 100; exec "$@"', "sh")
    with server(tmp_path / "log", "--checkpoint", str(tiny_checkpoint), under=few) as running, ExitStack() as stack:
        check_answers(stack.enter_context(wait_until_ready(running)))
        port = httpx.URL(running.url).port
        for _ in range(120):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert httpx.get(f"{running.url}/health/ready").json()["status"] == "ready"
        with grpc.insecure_channel(wait_for_grpc(running)) as channel:
            assert DenoiserStub(channel).GetModel(pb.GetModelRequest()).name


def test_a_server_ends_with_its_terminal(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The same signal means something else when it comes because a terminal window was closed."""
    terminal, inside = pty.openpty()
    own_it = (
        "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # these tests may themselves run under nohup
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    flags = ("--http_port", "0", "--grpc_port", "0", "--checkpoint", str(tiny_checkpoint))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", own_it, sys.executable, "-m", "service", *flags],
            cwd=ROOT, stdin=inside, stdout=log, stderr=log, start_new_session=True, text=True,
        )  # fmt: skip
    os.close(inside)
    running = Server(process, tmp_path / "log")
    try:
        wait_for(running, lambda: "ready after" in running.log.read_text() or None)
        os.close(terminal)
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.wait()


def test_grpc_beside_rest(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint", str(tiny_checkpoint), "--max_steps_limit", "1000000000")
    endless = pb.DenoiseRequest(text="[MASK]", max_steps=10**9, threshold=0)
    with server(tmp_path / "log", *flags) as running, wait_until_ready(running) as client:
        with grpc.insecure_channel(wait_for_grpc(running)) as channel:
            stub = DenoiserStub(channel)
            health = HealthStub(channel).Check(HealthCheckRequest(), wait_for_ready=True)
            assert health.status == HealthCheckResponse.SERVING
            assert "rdt.v1.Denoiser" in ProtoReflectionDescriptorDatabase(channel).get_services()
            text = "The Quick [MASK]  fox"
            assert stub.Denoise(pb.DenoiseRequest(text=text)).text == client.denoise(text).text
            model = client.model()
            assert stub.GetModel(pb.GetModelRequest()).digest == model.digest
            tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}
            inferred = httpx.post(f"{running.url}/v2/models/{model.name}/infer", json={"inputs": [tensor]}).json()
            assert inferred["outputs"][0]["data"] == [client.denoise(text).text]

            answer = answer_before_the_deadline(stub, endless)
            assert answer.halt_reason == "deadline"

            stream = stub.DenoiseStream(endless)
            assert [next(stream).WhichOneof("event") for _ in range(2)] == ["pass", "pass"]
            stream.cancel()
            wait_for(running, lambda: "rdt_live_requests 0.0" in httpx.get(f"{running.url}/metrics").text or None)

            endless.timeout_ms = 3000
            slow = stub.Denoise.future(endless)
            wait_for(running, lambda: "rdt_live_requests 1.0" in httpx.get(f"{running.url}/metrics").text or None)
            running.process.send_signal(signal.SIGTERM)
            wait_for(running, lambda: httpx.get(f"{running.url}/health/ready").json()["status"] == "draining" or None)
            wait_for(running, lambda: has_closed(stub) or None)
            assert slow.result().halt_reason == "deadline", "a call under way is answered"
        assert running.process.wait(timeout=10) == 0


def has_closed(stub: DenoiserStub) -> bool:
    """Whether no connection is taken. A call in the very moment of the signal is refused in another way."""
    with pytest.raises(grpc.RpcError) as refused:
        stub.Denoise(pb.DenoiseRequest(text="a"))
    return "failed to connect" in str(refused.value)


def answer_before_the_deadline(stub: DenoiserStub, request: pb.DenoiseRequest) -> pb.DenoiseResponse:
    """Of a call with a deadline of its own. A busy machine may stop everything for longer than the server allows for
    the way back, though hardly every time.
    """
    for _ in range(4):
        with suppress(grpc.RpcError):
            return stub.Denoise(request, timeout=1.5)
    return stub.Denoise(request, timeout=1.5)


def check_answers(client: Client) -> None:
    answer = client.denoise("The Quick [MASK]  fox", trace=True)
    assert re.fullmatch(r"The Quick \S+  fox", answer.text)
    assert answer.trace is not None
    assert len(answer.trace) == answer.steps
    assert answer.timing_ms.total >= answer.timing_ms.compute > 0
    assert client.model().label == answer.model
    with pytest.raises(ProblemError, match="max_steps is 0"):
        client.denoise("a", max_steps=0)


def _found(pattern: str, log: str) -> str | None:
    found = re.search(pattern, log)
    return found[1] if found else None
