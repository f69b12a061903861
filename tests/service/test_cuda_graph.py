"""Captured passes: the rules of capturing, with a graph of our own making. `tests/gpu` has the real thing."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch

from rdt_core import RDT
from service.engine import cuda_graph
from service.engine.cuda_graph import CapturedPasses
from service.engine.lookahead import LookaheadBackend
from service.engine.reference import run_reference
from service.engine.static_batch import Bucket, Buffers
from tests.service.test_eager import LIMITS, random_job, run_all


class Recording:
    """A graph on a CPU: remembers the pass that was made while it recorded, and makes it again."""

    current: Recording | None = None
    made = 0
    warmed_on: ClassVar[list[Any]] = []  # streams
    came_back_to: ClassVar[list[Any]] = []  # streams
    alive: ClassVar[WeakSet[Recording]] = WeakSet()

    def __init__(self) -> None:
        self.pass_of: tuple[RDT, Buffers, Bucket] | None = None
        Recording.made += 1
        Recording.alive.add(self)

    def replay(self) -> None:
        assert self.pass_of is not None
        model, buffers, bucket = self.pass_of
        lengths = (buffers.offsets.diff()[: bucket.n_places]).tolist()  # what varlen attention reads on the device
        dead = bucket.n_rows - sum(lengths)
        seen = [length for length in lengths if length] + [dead] * (dead > 0)
        assert max(lengths) <= bucket.longest, "what a graph was captured for is enough"
        places = bucket.offsets, bucket.positions, bucket.sequence_ids
        static = Bucket(tuple(seen), *places, bucket.n_rows, bucket.n_places, max(lengths))
        real_one_pass(model, buffers, static)


real_one_pass = cuda_graph.one_pass


@pytest.fixture
def graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures record instead of computing, as on a card; passes to warm up spoil whatever they touch."""

    @contextlib.contextmanager
    def graph(recording: Recording, stream: Any, **_: Any) -> Iterator[None]:
        assert Recording.current is None, "a process has one capture under way"
        assert stream is Recording.warmed_on[-1], "captured where it was warmed, not on a stream of another card"
        Recording.current = recording
        time.sleep(0)  # another thread may try
        yield
        Recording.current = None

    def one_pass(model: RDT, buffers: Buffers, bucket: Bucket) -> None:
        if Recording.current is None:
            for buffer in buffers:
                buffer.fill_(1)
        else:
            Recording.current.pass_of = (model, buffers, bucket)

    class Stream:
        def __init__(self, _device: Any = None) -> None:
            pass

        def wait_stream(self, _other: Any) -> None:
            pass

    def stream(on: Any) -> contextlib.AbstractContextManager[None]:
        Recording.warmed_on.append(on)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    serving = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: serving)
    monkeypatch.setattr(torch.cuda, "set_stream", Recording.came_back_to.append)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(cuda_graph, "one_pass", one_pass)
    Recording.made, Recording.current, Recording.warmed_on = 0, None, []
    Recording.came_back_to.clear()
    Recording.alive.clear()


@pytest.mark.usefixtures("graphs_on_cpu")
def test_replays_answer_as_the_reference_does(tiny_model: RDT) -> None:
    """What a graph holds is a size, never a batch: every batch of that size comes out right."""
    rng = random.Random(1)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(40)]
    backend = LookaheadBackend(tiny_model, LIMITS.token_budget, LIMITS.max_live, CapturedPasses(tiny_model))
    for job, result in zip(jobs, run_all(backend, jobs, rng), strict=True):
        alone = run_reference(tiny_model, job)
        assert (result.tokens, result.steps, result.reason) == (alone.tokens, alone.steps, alone.reason)
    assert Recording.made == 2, "sizes of 64 and 80 rows, once each"


@pytest.mark.usefixtures("graphs_on_cpu")
def test_replicas_that_warm_at_once_capture_one_after_the_other(tiny_model: RDT) -> None:
    sizes = [cuda_graph.Size(64 + n, 9) for n in range(20)]

    def prepare_one(_: int) -> int:
        passes = CapturedPasses(tiny_model)
        passes.prepare(Buffers.of(tiny_model, 96, 9), sizes)
        return len(passes.graphs)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(prepare_one, range(4))) == [20] * 4


@pytest.mark.usefixtures("graphs_on_cpu")
def test_what_cannot_be_captured_is_launched(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    passes = CapturedPasses(tiny_model)
    backend = LookaheadBackend(tiny_model, LIMITS.token_budget, LIMITS.max_live, passes)
    passes.prepare(backend._buffers, backend._sizes)
    backend._prepared = True
    monkeypatch.setattr(cuda_graph, "one_pass", real_one_pass)
    rng = random.Random(2)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(10)]
    for job, result in zip(jobs, run_all(backend, jobs, rng), strict=True):
        assert result.tokens == run_reference(tiny_model, job).tokens
    assert "one kernel at a time: operation not permitted" in caplog.text


@pytest.mark.usefixtures("graphs_on_cpu")
def test_no_memory_for_a_capture_is_no_reason_to_give_up_capturing(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = [cuda_graph.Size(64, 9), cuda_graph.Size(96, 9), cuda_graph.Size(128, 9)]
    passes, buffers = CapturedPasses(tiny_model), Buffers.of(tiny_model, 128, 9)
    buffers.level.fill_(0.5)
    recording = torch.cuda.graph

    def graph(graph: Recording, **settings: Any) -> Any:
        if Recording.made <= 2:  # those of 128 and of 96 rows
            raise torch.OutOfMemoryError("CUDA out of memory")
        return recording(graph, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "graph", graph)
    passes.prepare(buffers, sizes)
    assert buffers.level.tolist() == [0.5] * 9, "a capture leaves no trace in the batch"
    assert list(passes.graphs) == [64], "smaller ones may fit"
    assert "passes of 128 rows cannot be captured" in caplog.text
    gc.collect()
    assert len(Recording.alive) == 3, "a failed graph that goes would take the workspace of its stream along"
    assert len(Recording.came_back_to) == 3, "whatever became of a capture, what follows runs where it ran"
    assert set(Recording.came_back_to) == {torch.cuda.current_stream()}
    launched: list[int] = []
    monkeypatch.setattr(cuda_graph, "one_pass", lambda _model, _buffers, bucket: launched.append(bucket.n_rows))
    passes(buffers, passes._any_batch(buffers, sizes[1]))
    assert launched == [96], "there was memory for the pass itself, and it is not captured again in every tick"
    assert Recording.made == 3


@pytest.mark.usefixtures("graphs_on_cpu")
def test_no_memory_for_a_pass_is_said_by_the_tick(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [cuda_graph.Size(64, 9), cuda_graph.Size(96, 9)]
    passes, buffers = CapturedPasses(tiny_model), Buffers.of(tiny_model, 96, 9)
    works = cuda_graph.one_pass

    def short(model: RDT, buffers: Buffers, bucket: Bucket) -> None:
        if bucket.n_rows == 96:
            raise torch.OutOfMemoryError("CUDA out of memory")
        works(model, buffers, bucket)

    monkeypatch.setattr(cuda_graph, "one_pass", short)
    passes.prepare(buffers, sizes)
    assert list(passes.graphs) == [64]
    bucket = passes._any_batch(buffers, sizes[1])
    with pytest.raises(torch.OutOfMemoryError):
        passes(buffers, bucket)
    monkeypatch.setattr(cuda_graph, "one_pass", works)
    passes(buffers, bucket)
    assert list(passes.graphs) == [64, 96], "there is memory again"
