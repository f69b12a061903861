"""Two replicas on a Ray of this machine: they answer as a single server does, and go on when one is lost."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from google.protobuf.message import Message
from grpc_status import rpc_status

from rdt_core import checkpoint
from service.rpc.convert import INFERENCE_SERVICE
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb import open_inference_pb2 as oip
from service.rpc.pb.denoiser_pb2_grpc import DenoiserStub
from tests.e2e.ray_cluster import Cluster, cluster
from tests.e2e.test_server import ROOT, answer_before_the_deadline, server, wait_for_grpc, wait_until_ready
from tests.ports import free_ports

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.ray,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra: pip install '.[ray]'"),
]

ENDLESS: dict[str, Any] = {"text": "[MASK]", "max_steps": 10**9, "threshold": 0}
LONG: dict[str, Any] = {"text": "the [MASK] fox", "max_steps": 300, "threshold": 0}
N_CALLERS = 8
PATIENCE_SECONDS = 120.0
DRAINING = "Waiting for an additional"
"""What Serve logs of a replica that is to go and has requests under way."""


def configuration(weights: Path) -> dict[str, Any]:
    """deploy/ray/serve.yaml with gRPC turned on, for a tiny model and an impatient autoscaler."""
    text = (ROOT / "deploy" / "ray" / "serve.yaml").read_text()
    config: dict[str, Any] = yaml.safe_load(re.sub(r"(?m)^# (grpc_options:|  \S.*)$", r"\1", text))
    config["http_options"]["port"], config["grpc_options"]["port"] = free_ports(2)
    (application,) = config["applications"]
    application["runtime_env"]["env_vars"]["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "0.5"
    application["args"] |= {
        "checkpoint": str(weights), "min_replicas": 2, "max_replicas": 3, "max_live": 4, "token_budget": 32,
        "max_waiting": 48, "max_steps_limit": 10**9, "target_load": 1, "window_seconds": 2, "upscale_seconds": 0.5,
        "downscale_seconds": 2,
    }  # fmt: skip
    return config


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint file that a test may change."""
    path = tmp_path_factory.mktemp("weights") / "best_model.pt"
    path.write_bytes(tiny_checkpoint.read_bytes())
    return path


@pytest.fixture(scope="module")
def running(weights: Path) -> Iterator[Cluster]:
    with cluster(configuration(weights)) as started:
        started.wait_for(lambda: len(started.ready()) == 2 or None)
        yield started


@pytest.fixture
def stub(running: Cluster) -> Iterator[DenoiserStub]:
    with grpc.insecure_channel(running.address) as channel:
        yield DenoiserStub(channel)


def test_rest_and_grpc_answer_as_a_single_server_does(running: Cluster, tiny_checkpoint: Path, tmp_path: Path) -> None:
    texts = ["The Quick [MASK]  fox", "[MASK] [MASK]", "no masks at all"]
    tensor = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts}
    requests: list[tuple[str, Any]] = [
        *(("/denoise", {"text": text, "top_k": 2, "trace": True, "max_steps": 5}) for text in texts),
        ("/denoise", {"text": "a", "max_steps": 0}),
        ("/denoise", {}),
        ("/denoise", {"text": "a " * 100}),
        ("/denoise/batch", {"items": [{"text": "a [MASK]"}, {"text": "a", "top_k": -1}]}),
        ("/denoise/stream", {"text": "the [MASK] fox"}),
        ("/v2/models/tiny/infer", {"inputs": [tensor], "outputs": [{"name": "steps"}, {"name": "text"}]}),
        ("/v2/models/other/infer", {"inputs": [tensor]}),
        ("/nowhere", {}),
    ]
    flags = ("--checkpoint", str(tiny_checkpoint), "--max_steps_limit", str(10**9), "--token_budget", "32")
    with server(tmp_path / "log", *flags) as single, wait_until_ready(single):
        for path, body in requests:
            alone, many = (httpx.post(url + path, json=body, timeout=30) for url in (single.url, running.url))
            assert (many.status_code, comparable(many.text)) == (alone.status_code, comparable(alone.text))
            for name in ("content-type", "retry-after", "cache-control"):
                assert many.headers.get(name) == alone.headers.get(name)
            assert len(many.headers.get_list("x-request-id")) == 1
        assert httpx.get(f"{running.url}/model").json() == httpx.get(f"{single.url}/model").json()
        with (
            grpc.insecure_channel(wait_for_grpc(single)) as to_single,
            grpc.insecure_channel(running.address) as to_many,
        ):
            for alone_call, many_call in zip(calls(to_single), calls(to_many), strict=True):
                assert ended(many_call) == ended(alone_call)
    assert_both_are_visible(running)


def test_calls_that_are_left_or_late_free_the_engine(running: Cluster, stub: DenoiserStub) -> None:
    assert answer_before_the_deadline(stub, pb.DenoiseRequest(**ENDLESS)).halt_reason == "deadline"
    for n_events in range(8):
        events = stub.DenoiseStream(pb.DenoiseRequest(**ENDLESS))
        for _ in range(n_events):
            assert next(events).WhichOneof("event") == "pass"
        events.cancel()
        with httpx.stream("POST", f"{running.url}/denoise/stream", json=ENDLESS, timeout=30) as response:
            next(response.iter_lines())
    running.wait_for(lambda: _idle(running) or None)


def assert_both_are_visible(running: Cluster) -> None:
    """Any replica shows both, each with its own counts, which add up to what was asked."""
    names = running.ready()
    assert len(names) == 2

    def answered() -> dict[str, float] | None:
        found = re.findall(r'^rdt_request_duration_seconds_count\{replica="(\w+)"\} (\S+)', running.metrics(), re.M)
        counts = {name: float(count) for name, count in found}
        # Eight answers by REST and five by gRPC, of which the texts of a batch are some.
        return counts if set(counts) == names and sum(counts.values()) == 13 else None

    running.wait_for(answered, seconds=30)


def comparable(text: str) -> str:
    """Without what differs from one time to the next."""
    return re.sub(r'"timing_ms": ?\{.*?\}|"request_id": ?"[^"]*"', "", text)


def calls(channel: grpc.Channel) -> list[Callable[[], Any]]:
    stub = DenoiserStub(channel)
    fox, bad = pb.DenoiseRequest(text="the [MASK] fox", top_k=1), pb.DenoiseRequest(text="a", max_steps=0)
    outputs = [oip.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in ("text", "level")]
    foxes = oip.ModelInferRequest(model_name="tiny", outputs=outputs)
    foxes.inputs.add(name="text", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"the [MASK]", b"fox"])

    def inference(method: str, request: Message) -> Callable[[], Any]:
        answer = getattr(oip, f"{method}Response").FromString
        return lambda: channel.unary_unary(f"/{INFERENCE_SERVICE}/{method}", None, answer)(request.SerializeToString())

    return [
        lambda: stub.Denoise(fox),
        lambda: stub.Denoise(bad),
        lambda: stub.DenoiseBatch(pb.DenoiseBatchRequest(items=[fox, bad])),
        lambda: stub.DenoiseBatch(pb.DenoiseBatchRequest()),
        lambda: list(stub.DenoiseStream(fox)),
        lambda: list(stub.DenoiseStream(bad)),
        lambda: stub.GetModel(pb.GetModelRequest()),
        inference("ServerLive", oip.ServerLiveRequest()),
        inference("ServerReady", oip.ServerReadyRequest()),
        inference("ModelReady", oip.ModelReadyRequest(name="tiny")),
        inference("ServerMetadata", oip.ServerMetadataRequest()),
        inference("ModelMetadata", oip.ModelMetadataRequest(name="tiny")),
        inference("ModelInfer", foxes),
        inference("ModelInfer", oip.ModelInferRequest(model_name="other")),
    ]


def ended(call: Callable[[], Any]) -> Any:
    """What came of a call, in words that can be compared."""
    try:
        answers = call()
    except grpc.RpcError as error:
        return error.code(), error.details(), rpc_status.from_call(error)
    messages: list[Message] = answers if isinstance(answers, list) else [answers]
    return [re.sub(r"timing_ms \{[^}]*\}", "", str(message)) for message in messages]


@pytest.mark.slow
def test_a_lost_replica_costs_a_retry_and_comes_back(running: Cluster) -> None:
    """Serve does not send a request again that a replica had taken: its caller is told to, on both transports."""
    before = running.ready()
    with callers(running, LONG) as (outcomes, finished):
        running.wait_for(lambda: outcomes["ok"] >= N_CALLERS or None)
        (pid, *_) = running.replicas()
        os.kill(pid, signal.SIGKILL)
        running.wait_for(lambda: len(running.ready() - before) == 1 or None)
        at_return = outcomes["ok"]
        running.wait_for(lambda: outcomes["ok"] >= at_return + N_CALLERS or None)
        finished.set()
    assert set(outcomes) <= {"ok", "503", "UNAVAILABLE"}, outcomes
    assert 0 < outcomes["503"] + outcomes["UNAVAILABLE"] <= N_CALLERS, "those it was computing, and no others"
    running.wait_for(lambda: len(running.ready()) == 2 or None)


@pytest.mark.slow
def test_waiting_requests_bring_a_replica_and_it_goes_again_with_nothing_lost(running: Cluster) -> None:
    assert len(running.ready()) == 2
    # Five of these, so that the one that is to go still has some; Serve may pick any of the three. Of the four that a
    # replica may have at a time, eight would be the work of two.
    held = {**ENDLESS, "timeout_ms": 20_000}
    with ThreadPoolExecutor(6) as threads:
        with callers(running, LONG, n_callers=48) as (outcomes, finished):
            running.wait_for(lambda: len(running.ready()) == 3 or None)
            n_drained = running.log().count(DRAINING)
            asked = [threads.submit(httpx.post, f"{running.url}/denoise", json=held, timeout=60) for _ in range(5)]
            time.sleep(1)  # for them to be taken
            finished.set()
        answers = [future.result() for future in asked]
    assert running.log().count(DRAINING) > n_drained, "they were not held for long enough"
    assert set(outcomes) == {"ok"}
    statuses = {answer.status_code for answer in answers}
    # A replica computes four at a time. If Serve gives one more of these to the same, it finds no room in its time.
    assert {200} <= statuses <= {200, 504}, [answer.text for answer in answers]
    running.wait_for(lambda: (len(running.ready()), len(running.replicas())) == (2, 2) or None)


@pytest.mark.slow
async def test_more_than_all_can_hold_is_refused_at_once_and_in_words(running: Cluster) -> None:
    held = {**ENDLESS, "timeout_ms": 6000}
    unlimited = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=running.url, timeout=60, limits=unlimited) as client:
        answers = await asyncio.gather(*(client.post("/denoise", json=held) for _ in range(250)))
    outcomes = Counter(answer.status_code for answer in answers)
    assert set(outcomes) <= {200, 429, 504}, "answered, refused, or never begun in the time it gave itself"
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused, "more than two or three queues of 48"
    for answer in refused:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["retry-after"] == "1"
    running.wait_for(lambda: _idle(running) or None)


@pytest.mark.slow
def test_every_replica_reloads_without_a_gap(running: Cluster, weights: Path) -> None:
    contents = checkpoint.read(weights)
    changed = {
        name: value + 0.01 if value.is_floating_point() else value for name, value in contents.model_state_dict.items()
    }
    first = httpx.get(f"{running.url}/model").json()["digest"]
    pids = set(running.replicas())
    with callers(running, {"text": "a [MASK]"}, n_callers=2) as (outcomes, finished):
        checkpoint.save(weights, replace(contents, model_state_dict=changed))
        running.config["applications"][0]["deployments"][0]["user_config"] = {"weights": 2}
        running.deploy()

        def digests() -> set[str] | None:
            found = re.findall(r'^rdt_model_info\{replica="\w+",.*digest="(\w+)"', running.metrics(), re.M)
            return set(found) if len(found) == len(running.ready()) and first not in found else None

        assert len(running.wait_for(digests)) == 1
        finished.set()
    assert set(outcomes) == {"ok"}
    assert len(pids & set(running.replicas())) >= 2, "the same processes"


@pytest.mark.slow
def test_taking_the_application_away_loses_nothing_that_was_accepted(running: Cluster) -> None:
    """The last one: nothing answers after it."""
    held = {**ENDLESS, "timeout_ms": 5000}
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(httpx.post, f"{running.url}/denoise", json=held, timeout=60) for _ in range(4)]
        running.wait_for(lambda: _n_live(running) == 4 or None)
        running.config["applications"] = []
        running.deploy()
        assert [future.result().status_code for future in asked] == [200] * 4
    running.wait_for(lambda: running.replicas() == [] or None)
    assert httpx.get(f"{running.url}/health/ready").status_code == 404, "the proxy is still there"


@contextmanager
def callers(
    running: Cluster, request: dict[str, Any], n_callers: int = N_CALLERS
) -> Iterator[tuple[Counter[str], threading.Event]]:
    """Half by REST and half by gRPC, each asking again and again until told that it is enough. A caller that is told
    to try again does so; the block ends when every request that was begun has been answered.
    """
    outcomes: Counter[str] = Counter()
    finished = threading.Event()
    give_up = time.monotonic() + PATIENCE_SECONDS

    def rest() -> None:
        with httpx.Client(base_url=running.url, timeout=PATIENCE_SECONDS) as client:
            owed = False
            while (owed or not finished.is_set()) and time.monotonic() < give_up:
                response = client.post("/denoise", json=request)
                owed = response.status_code != 200
                outcomes[str(response.status_code) if owed else "ok"] += 1
                time.sleep(float(response.headers.get("retry-after", 0)))
            assert not owed

    def rpc() -> None:
        with grpc.insecure_channel(running.address) as channel:
            owed = False
            while (owed or not finished.is_set()) and time.monotonic() < give_up:
                try:
                    DenoiserStub(channel).Denoise(pb.DenoiseRequest(**request))
                    owed = False
                    outcomes["ok"] += 1
                except grpc.RpcError as error:
                    owed = True
                    outcomes[error.code().name] += 1
                    time.sleep(1)
            assert not owed

    with ThreadPoolExecutor(n_callers) as threads:
        asking = [threads.submit(rest if number % 2 else rpc) for number in range(n_callers)]
        try:
            yield outcomes, finished
        finally:
            finished.set()
    for caller in asking:
        caller.result()


def _idle(running: Cluster) -> bool:
    found = re.findall(r"^rdt_(?:live|waiting)_requests\{\S+ (\S+)", running.metrics(), re.M)
    return bool(found) and not any(map(float, found))


def _n_live(running: Cluster) -> float:
    return sum(map(float, re.findall(r"^rdt_live_requests\{\S+ (\S+)", running.metrics(), re.M)))
