"""Real processes: a supervisor, an engine and two workers, and what becomes of the others when one is killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest

from rdt_core import checkpoint
from service.client import Client, ProblemError
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb.denoiser_pb2_grpc import DenoiserStub
from tests.e2e.test_server import Server, server, wait_for, wait_until_ready

pytestmark = pytest.mark.e2e

LONG = {"max_steps": 1_000_000, "threshold": 0}
FLAGS = ("--api_workers", "2", "--max_steps_limit", "1000000", "--replicas", "1", "--admin_key", "adm1n")


@contextmanager
def crew(log: Path, path: Path, *flags: str) -> Iterator[tuple[Server, Client]]:
    """A server with two workers, both ready. Nothing of it is left at the end, whatever happens."""
    with server(log, "--checkpoint", str(path), *FLAGS, *flags) as running:
        try:
            with wait_until_ready(running) as client:
                wait_for(running, lambda: running.log.read_text().count("listening on http") == 2 or None)
                yield running, client
        finally:
            running.process.kill()
            for pid in all_children(running):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def all_children(running: Server) -> list[int]:
    return [int(pid) for pid in re.findall(r"started .* as process (\d+)", running.log.read_text())]


def child(running: Server, name: str) -> int:
    return wait_for(running, lambda: _last(rf"started {name} as process (\d+)", running.log.read_text()))


def _last(pattern: str, text: str) -> int | None:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else None


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(seen: Callable[[], bool], seconds: float = 30.0) -> None:
    give_up = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.02)


def answered(client: Client) -> bool:
    """One request, on a connection of its own: any worker may get it."""
    with suppress(ProblemError, httpx.TransportError), Client(str(client._http.base_url)) as fresh:
        return fresh.denoise("the [MASK]").steps > 0
    return False


def metric(running: Server, name: str) -> float:
    text = httpx.get(f"{running.url}/metrics").text
    return float(re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[0])


@pytest.mark.slow
def test_a_life_with_deaths_in_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_checkpoint, tmp_path / "best_model.pt"))
    with crew(tmp_path / "log", path) as (running, client):
        text = running.log.read_text()
        wait_for(running, lambda: all(answered(client) for _ in range(20)) or None)
        asked = metric(running, 'rdt_requests_total{outcome="ok",transport="rest"}')
        assert asked >= 20
        ask_by_grpc(text)
        eventually(lambda: metric(running, 'rdt_requests_total{outcome="ok",transport="grpc"}') == 8)

        os.kill(child(running, r"worker 0\.0"), signal.SIGKILL)
        child(running, r"worker 0\.1")
        wait_for(running, lambda: running.log.read_text().count("listening on http") == 3 or None)
        wait_for(running, lambda: all(answered(client) for _ in range(20)) or None)
        assert metric(running, 'rdt_requests_total{outcome="ok",transport="rest"}') >= asked + 20 - 1

        reload_everywhere(running, client, path)
        kill_the_engine(running, client)

        with ThreadPoolExecutor(1) as thread, Client(running.url) as patient:
            slow = thread.submit(patient.denoise, "[MASK]", timeout_ms=1500, **LONG)
            wait_for(running, lambda: metric(running, "rdt_live_requests") == 1 or None)
            running.process.send_signal(signal.SIGTERM)
            eventually(lambda: refuses_grpc(text))
            assert not slow.done()
            assert slow.result(timeout=10).halt_reason == "deadline", "a request under way is answered"
        assert running.process.wait(timeout=20) == 0
        assert not any(is_alive(pid) for pid in all_children(running))


def ask_by_grpc(log: str) -> None:
    address = re.findall(r"listening on grpc://(\S+)", log)[0]
    for number in range(8):  # options that differ make connections that differ
        with grpc.insecure_channel(address, options=[("rdt.test", number)]) as channel:
            answer = DenoiserStub(channel).Denoise(
                pb.DenoiseRequest(text="the [MASK]"), wait_for_ready=True, timeout=20
            )
            assert answer.steps > 0


def refuses_grpc(log: str) -> bool:
    host, port = re.findall(r"listening on grpc://(\S+):(\d+)", log)[0]
    try:
        socket.create_connection((host, int(port))).close()
    except ConnectionRefusedError:
        return True
    return False


def reload_everywhere(running: Server, client: Client, path: Path) -> None:
    """Asked of one worker, and by a signal to the supervisor; no worker serves the old model after the answer."""
    admin = {"X-API-Key": "adm1n"}
    for ask in (
        lambda: httpx.post(f"{running.url}/model/reload", headers=admin, timeout=30).raise_for_status(),
        lambda: running.process.send_signal(signal.SIGHUP),
    ):
        before = client.model().digest
        held = checkpoint.read(path)
        checkpoint.save(path, replace(held, step=held.step + 1))
        ask()
        wait_for(running, lambda before=before: client.model().digest != before or None)
        after = client.model().digest
        wait_for(running, lambda after=after: all(digest_of_any(running) == after for _ in range(20)) or None)


def digest_of_any(running: Server) -> str:
    with Client(running.url) as fresh:
        return fresh.model().digest


def kill_the_engine(running: Server, client: Client) -> None:
    """Its callers are told at once; the workers are ready again by themselves, and no counter has gone back."""
    counted = metric(running, "rdt_tick_tokens_count")
    with ThreadPoolExecutor(1) as thread, Client(running.url) as unlucky:
        lost = thread.submit(unlucky.denoise, "[MASK]", timeout_ms=30_000, **LONG)
        wait_for(running, lambda: metric(running, "rdt_live_requests") == 1 or None)
        os.kill(child(running, "engine"), signal.SIGKILL)
        with pytest.raises(ProblemError, match="503"):
            lost.result(timeout=5)
    assert httpx.get(f"{running.url}/health/ready").status_code == 503
    wait_for(running, lambda: "starting it anew" in running.log.read_text() or None)
    wait_for(running, lambda: all(answered(client) for _ in range(10)) or None)
    assert metric(running, "rdt_tick_tokens_count") > counted


@pytest.mark.slow
def test_an_engine_that_dies_twice_ends_the_server(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with crew(tmp_path / "log", tiny_checkpoint) as (running, _):
        first = child(running, "engine")
        os.kill(first, signal.SIGKILL)
        second = wait_for(running, lambda: next((p for p in [child(running, "engine")] if p != first), None))
        os.kill(second, signal.SIGKILL)
        assert running.process.wait(timeout=30) == 1
        assert not any(is_alive(pid) for pid in all_children(running))


def test_children_do_not_outlive_a_supervisor_that_is_killed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with crew(tmp_path / "log", tiny_checkpoint) as (running, _):
        (folder,) = tmp_path.glob("rdt-*")
        assert folder.stat().st_mode & 0o777 == 0o700, "nobody else can speak to the engine"
        running.process.kill()
        eventually(lambda: not any(is_alive(pid) for pid in all_children(running)))
        assert not folder.exists()


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "missing.pt"
    with server(tmp_path / "log", "--checkpoint", str(path), *FLAGS) as running:
        assert running.process.wait(timeout=60) == 1
        said = running.log.read_text()
        assert f"rdt-serve: cannot start: {path}: no such file\n" in said
        assert "Traceback" not in said
        assert not any(is_alive(pid) for pid in all_children(running))
