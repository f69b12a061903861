"""Births, deaths and their limits, with processes that only pretend; and the ports that all share."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.settings import Settings
from service.workers import supervisor
from service.workers.children import BAD_INPUT, CANNOT_START, CRASHED, ENGINE_FAILED, Child, Orders
from service.workers.supervisor import MAX_WORKER_DEATHS, Crew, reserved, supervise
from tests.ports import free_ports
from tests.service.workers.fleet import until


class FakeChild:
    """Lives until it is told to end, or a test ends it."""

    born: list[FakeChild]
    signals: list[tuple[str, signal.Signals]]
    patience: list[float]  # seconds that each got to end, in the order of their ends

    def __init__(self, orders: Orders) -> None:
        self.name = f"{orders.role} {orders.name}".strip()
        self.pid = 0
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(cls, orders: Orders) -> FakeChild:
        cls.born.append(child := cls(orders))
        return child

    async def wait(self) -> int:
        return await asyncio.shield(self.status)

    def send(self, number: signal.Signals) -> None:
        self.signals.append((self.name, number))

    async def end(self, seconds: float) -> None:
        self.patience.append(seconds)
        self.send(signal.SIGTERM)
        await asyncio.sleep(0.01)
        self.die(0)

    async def kill(self) -> None:
        self.die(-9)

    def die(self, status: int) -> None:
        if not self.status.done():
            self.status.set_result(status)


async def test_children_outlive_a_hangup_that_comes_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Child, "command", (sys.executable, "-c", "import time; time.sleep(30)"))
    orders = Orders.of("worker", "0", Path("none"), Settings())
    children = await asyncio.gather(Child.start(orders), Child.start(orders))
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for child in children:
        child.send(signal.SIGHUP)
    await asyncio.sleep(0.1)
    for child in children:
        child.send(signal.SIGKILL)
        assert await child.wait() == -signal.SIGKILL


class Life:
    """A crew of two workers at work."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        self.crew = Crew(Settings(api_workers=2), Path("socket"))
        self.work = asyncio.create_task(self.crew.work(self.stopped))

    def child(self, name: str) -> FakeChild:
        return next(child for child in reversed(FakeChild.born) if child.name == name)

    async def has(self, name: str) -> FakeChild:
        await until(lambda: any(child.name == name for child in FakeChild.born))
        return self.child(name)


@pytest.fixture
async def life(monkeypatch: pytest.MonkeyPatch) -> Life:
    FakeChild.born, FakeChild.signals, FakeChild.patience = [], [], []
    monkeypatch.setattr(supervisor, "Child", FakeChild)
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS", 0.001)
    life = Life()
    await until(lambda: len(FakeChild.born) == 3)
    return life


async def test_the_end_begins_with_the_workers(life: Life) -> None:
    life.stopped.set()
    assert await life.work == 0
    assert [name for name, _ in FakeChild.signals] == ["worker 0.0", "worker 1.0", "engine"]
    assert {number for _, number in FakeChild.signals} == {signal.SIGTERM}
    margin = supervisor.MARGIN_SECONDS
    assert FakeChild.patience == [*[Settings().grace_seconds + margin] * 2, margin], "the engine has no callers then"
    assert len(FakeChild.born) == 3, "nobody is replaced on the way down"


async def test_what_is_left_is_killed(life: Life) -> None:
    life.work.cancel()
    await life.crew.kill()
    assert [child.status.result() for child in FakeChild.born] == [-9, -9, -9]
    unborn = Crew(Settings(), Path("socket"))
    unborn.reload()  # nobody has been started
    await unborn.kill()


async def test_a_worker_that_dies_is_replaced_under_another_name(life: Life, caplog: pytest.LogCaptureFixture) -> None:
    life.child("worker 1.0").die(-9)
    await life.has("worker 1.1")
    life.child("worker 0.0").die(0)
    await life.has("worker 0.1")
    assert "worker 1.0 has ended (signal 9): starting another" in caplog.text
    assert "worker 0.0 has ended (status 0): starting another" in caplog.text
    life.stopped.set()
    assert await life.work == 0
    assert ("worker 1.1", signal.SIGTERM) in FakeChild.signals


async def test_no_room_for_a_process_is_waited_for(
    life: Life, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    births, start = [0], FakeChild.start

    async def refused(orders: Orders) -> FakeChild:
        births[0] += 1
        if births[0] < 4:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return await start(orders)

    monkeypatch.setattr(FakeChild, "start", refused)
    life.child("worker 1.0").die(-9)
    await life.has("worker 1.1")
    assert births == [4]
    births[0] = -(10**6)  # for good
    life.child("worker 0.0").die(-9)
    assert await life.work == 1
    assert births == [supervisor.MAX_STARTS - 10**6]
    told = [name for name, number in FakeChild.signals if number == signal.SIGTERM]
    assert told[-2:] == ["worker 1.1", "engine"], "what others have accepted is finished first"
    assert "no process can be started: ending the server: [Errno 11]" in caplog.text
    assert "engine's process has ended" not in caplog.text


async def test_workers_that_die_again_and_again_end_the_server(life: Life) -> None:
    for turn in range(MAX_WORKER_DEATHS + 1):
        (await life.has(f"worker 0.{turn}")).die(-11)
    assert await life.work == 1


def clock_in_hand(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the supervisor reads from now on. It goes on from the true time, at which the first children were born."""
    clock = SimpleNamespace(now=time.monotonic())
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


async def test_a_worker_that_crashes_at_every_start_ends_the_server_however_long_it_takes(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = clock_in_hand(monkeypatch)
    for turn in range(3):
        worker = await life.has(f"worker 0.{turn}")
        clock.now += 27
        worker.die(CRASHED)
    assert await life.work == 1


async def test_crashes_that_lie_apart_do_not(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_in_hand(monkeypatch)
    for turn, (status, seconds) in enumerate([(CRASHED, 9), (CRASHED, 9), (-9, 9), (CRASHED, 9), (CRASHED, 900)]):
        worker = await life.has(f"worker 0.{turn}")
        clock.now += seconds
        worker.die(status)
    await life.has("worker 0.5")
    life.stopped.set()
    assert await life.work == 0


async def test_deaths_that_lie_apart_do_not_end_the_server(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_in_hand(monkeypatch)
    for turn in range(MAX_WORKER_DEATHS + 2):
        worker = await life.has(f"worker 0.{turn}")
        clock.now += supervisor.FATAL_WINDOW_SECONDS / MAX_WORKER_DEATHS
        worker.die(-9)
    await life.has(f"worker 0.{MAX_WORKER_DEATHS + 2}")
    life.stopped.set()
    assert await life.work == 0


@pytest.mark.parametrize("status", [ENGINE_FAILED, -9, 0])
async def test_an_engine_that_dies_is_replaced_once_in_a_minute(life: Life, status: int) -> None:
    life.child("engine").die(status)
    await until(lambda: len(FakeChild.born) == 4)
    life.child("engine").die(status)
    assert await life.work == 1
    assert {name for name, _ in FakeChild.signals} >= {"worker 0.0", "worker 1.0"}


async def test_an_engine_may_die_again_later(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FATAL_WINDOW_SECONDS", 0.0)
    for n_born in (4, 5, 6):
        life.child("engine").die(-9)
        await until(lambda n_born=n_born: len(FakeChild.born) == n_born)
    life.stopped.set()
    assert await life.work == 0


@pytest.mark.parametrize("status", [CANNOT_START, BAD_INPUT])
@pytest.mark.parametrize("name", ["engine", "worker 0.0"])
async def test_what_cannot_start_is_not_tried_again(
    life: Life, name: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    life.child(name).die(status)
    assert await life.work == status
    assert len(FakeChild.born) == 3
    assert "draining" not in caplog.text


async def test_there_is_a_pause_before_each_birth(
    life: Life, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refused(_: Orders) -> FakeChild:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(supervisor, "PAUSE_SECONDS", 60.0)
    life.child("worker 0.0").die(-9)
    await until(lambda: "starting another" in caplog.text)
    monkeypatch.setattr(FakeChild, "start", refused)
    life.child("engine").die(-9)
    await until(lambda: "cannot be started" in caplog.text)
    assert len(FakeChild.born) == 3
    assert caplog.text.count("cannot be started") == 1
    life.stopped.set()
    assert await life.work == 0


async def test_a_hangup_goes_to_the_engine(life: Life) -> None:
    life.crew.reload()
    assert FakeChild.signals == [("engine", signal.SIGHUP)]
    life.stopped.set()
    await life.work


def test_ports_are_chosen_once_and_held() -> None:
    with reserved(Settings(http_port=0, grpc_port=0)) as chosen:
        assert chosen.http_port != chosen.grpc_port
        for port in (chosen.http_port, chosen.grpc_port):
            with socket.socket() as another, pytest.raises(OSError, match="in use"):
                another.bind(("127.0.0.1", port))
            with socket.socket() as worker:
                worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                worker.bind(("127.0.0.1", port))


def test_an_address_that_another_server_shares_is_not_taken() -> None:
    with (
        reserved(Settings(http_port=0, grpc_port=0)) as first,
        pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{first.http_port}: "),
        reserved(Settings(http_port=first.http_port, grpc_port=0)),
    ):
        pass


def test_an_address_that_stays_taken_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "LINGERING_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            supervisor._bound_once_free("127.0.0.1", port)
    with pytest.raises(OSError, match="assign"):  # TEST-NET-1 (RFC 5737): nobody has it
        supervisor._bound_once_free("192.0.2.1", 0)
    assert caplog.text.count("waiting for") == 1, "there is nothing to wait for where nobody can be"


def test_an_address_may_be_of_ip_version_6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with reserved(Settings(host="::1", http_port=0, grpc_port=0)) as chosen:
        assert chosen.http_port > 0


def test_what_a_server_before_has_left_of_its_connections_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """It did not share its port, and so is in the way of one that does."""
    (port,) = free_ports(1)
    with socket.create_server(("127.0.0.1", port)) as listener:  # as an address to be used again
        caller = socket.create_connection(("127.0.0.1", port))
        served, _ = listener.accept()
    served.close()  # the end of the server comes first: it keeps the connection's
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing it forgets it
    closing = threading.Timer(0.3, caller.close)
    closing.start()
    with reserved(Settings(http_port=port, grpc_port=0)) as chosen:
        assert chosen.http_port == port
        assert not closing.is_alive()
    assert caplog.text.count("waiting for what a server before") == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_whoever_waits_for_them_can_be_ended(tmp_path: Path, number: signal.Signals, status: int) -> None:
    (port,) = free_ports(1)
    with socket.create_server(("127.0.0.1", port)) as listener:
        caller = socket.create_connection(("127.0.0.1", port))
        served, _ = listener.accept()
    served.close()
    command = [sys.executable, "-m", "service", f"--http_port={port}", "--grpc_port=0", "--api_workers=2"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            deadline = time.monotonic() + 60
            while b"waiting for what a server before" not in (tmp_path / "log").read_bytes():
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            server.send_signal(number)
            assert server.wait(timeout=10) == status
        finally:
            server.kill()
    caller.close()
    assert b"Traceback" not in (tmp_path / "log").read_bytes()


def test_the_supervisor_is_light() -> None:
    script = "import sys, service.cli, service.workers.supervisor; print(*{n.partition('.')[0] for n in sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(run.stdout.split()) & {"torch", "fastapi", "grpc", "tokenizers", "uvicorn"}


@pytest.mark.parametrize("stuck_seconds", [0.0, 60.0])
async def test_nobody_is_left_behind(monkeypatch: pytest.MonkeyPatch, stuck_seconds: float) -> None:
    """Whatever ends the work."""
    called: list[str] = []
    folders: list[Path] = []

    async def work(crew: Crew, _: asyncio.Event) -> int:
        folders.append(crew._path.parent)
        raise KeyError

    async def kill(_: Crew) -> None:
        called.append("kill")

    monkeypatch.setattr(supervisor, "asked_to_end", asyncio.Event)
    monkeypatch.setattr(supervisor, "on_hangup", lambda *_: None)
    monkeypatch.setattr(supervisor, "watch_event_loop", lambda: called.append("watch"))
    monkeypatch.setattr(Crew, "work", work)
    monkeypatch.setattr(Crew, "kill", kill)
    with pytest.raises(KeyError):
        await supervise(Settings(api_workers=2, stuck_seconds=stuck_seconds))
    assert called == (["watch", "kill"] if stuck_seconds else ["kill"])
    assert not folders[0].exists()


async def test_a_folder_for_temporary_files_too_deep_for_a_socket_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(OSError, match=r"TMPDIR: .*/engine has \d+ bytes: the path of a socket may have 103"):
        await supervise(Settings(api_workers=2))
    longest = "/" + "d" * (supervisor.MAX_SOCKET_PATH - len("//engine"))
    assert len(str(supervisor._socket_in(longest))) == supervisor.MAX_SOCKET_PATH
    with pytest.raises(OSError, match="has 104 bytes"):
        supervisor._socket_in(longest + "d")
