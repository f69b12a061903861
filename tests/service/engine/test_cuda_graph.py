"""Captured passes: the rules of capturing, with a tape for a graph. `tests/gpu` has the real thing."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch

from rdt_core import RDT, ModelConfig, layers
from service.engine import cuda_graph, lookahead
from service.engine.cuda_graph import CapturedPasses, can_capture
from service.engine.lookahead import LookaheadBackend, to_host
from service.engine.static_batch import Bucket, Buffers, PlainPasses
from tests.service.engine.tape import Tape
from tests.service.engine.test_eager import LIMITS, check_against_the_reference, random_job, run_all


class Recording:
    """A graph on a CPU."""

    current: Recording | None = None
    made = 0
    warmed_on: ClassVar[list[Any]] = []  # streams
    came_back_to: ClassVar[list[Any]] = []  # streams
    alive: ClassVar[WeakSet[Recording]] = WeakSet()

    def __init__(self) -> None:
        self.tape = Tape()
        Recording.made += 1
        Recording.alive.add(self)

    def replay(self) -> None:
        self.tape.replay()


real_one_pass = cuda_graph.one_pass


@pytest.fixture
def graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures record instead of computing, as on a card; passes to warm up spoil whatever they touch.

    Attention is the variable-length one while something is recorded, and by lengths on the host anywhere else.
    """

    @contextlib.contextmanager
    def graph(recording: Recording, stream: Any, **_: Any) -> Iterator[None]:
        assert Recording.current is None, "a process has one capture under way"
        assert stream is Recording.warmed_on[-1], "captured where it was warmed, not on a stream of another card"
        Recording.current = recording
        time.sleep(0)  # another thread may try
        try:
            with recording.tape:
                yield
        finally:
            Recording.current = None

    def one_pass(model: RDT, buffers: Buffers, bucket: Bucket) -> None:
        if Recording.current is None:
            for buffer in buffers:
                buffer.fill_(1)
        else:
            real_one_pass(model, buffers, bucket)

    class Stream:
        def __init__(self, _device: Any = None) -> None:
            pass

        def wait_stream(self, _other: Any) -> None:
            pass

    def stream(on: Any) -> contextlib.AbstractContextManager[None]:
        Recording.warmed_on.append(on)
        return contextlib.nullcontext()

    monkeypatch.setattr(layers, "has_varlen_attention", lambda *_: Recording.current is not None)
    monkeypatch.setattr(cuda_graph, "can_capture", lambda _: True)
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
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"level_conditioning": True, "n_prelude_layers": 1},
        {"norm": "post", "positions": "learned", "decoder_type": "dense"},
    ],
)
def test_replays_answer_as_the_reference_does(tiny_config: ModelConfig, changes: dict[str, object]) -> None:
    """What a graph holds is a size, never a batch: every batch of that size comes out right."""
    torch.manual_seed(0)
    model = RDT(tiny_config.with_changes(**changes)).eval().requires_grad_(False)
    rng = random.Random(1)
    jobs = [random_job(rng, model.config.vocab_size) for _ in range(40)]
    backend = LookaheadBackend(model, LIMITS.token_budget, LIMITS.max_live, CapturedPasses(model))
    check_against_the_reference(model, jobs, run_all(backend, jobs, rng))
    assert Recording.made == 2, "sizes of 64 and 80 rows, once each"


def test_without_attention_for_any_lengths_nothing_is_captured(tiny_model: RDT) -> None:
    """A graph would keep the lengths of the batch that it was captured with."""
    with pytest.raises(ValueError, match="no variable-length attention on cpu in fp32"):
        CapturedPasses(tiny_model)


def test_what_can_be_captured_goes_by_the_card_the_format_and_the_width_of_a_head(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = RDT(tiny_config.with_changes(d_model=48, n_heads=3)), []
    monkeypatch.setattr(cuda_graph, "has_varlen_attention", lambda *what: asked.append(what))
    for precision in ("fp32", "bf16"):
        model.precision = precision
        can_capture(model)
    assert asked == [(model.device, torch.float32, 16), (model.device, torch.bfloat16, 16)]


def peek_at_the_level(buffers: Buffers) -> object:
    return buffers.level[0].item()


def pick_rows_by_mask(buffers: Buffers) -> object:
    return buffers.hidden[buffers.masked]


def send_numbers(buffers: Buffers) -> object:
    return buffers.level + torch.tensor([0.5])


@pytest.mark.usefixtures("graphs_on_cpu")
@pytest.mark.parametrize("wrong", [peek_at_the_level, pick_rows_by_mask, send_numbers])
def test_a_pass_that_waits_for_the_device_would_not_be_captured(
    tiny_model: RDT,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: Callable[[Buffers], object],
) -> None:
    passes, buffers = CapturedPasses(tiny_model), Buffers.of(tiny_model, 64, 9)
    right = cuda_graph.one_pass

    def one_pass(model: RDT, buffers: Buffers, bucket: Bucket) -> None:
        right(model, buffers, bucket)
        wrong(buffers)

    monkeypatch.setattr(cuda_graph, "one_pass", one_pass)
    with torch.inference_mode():
        passes.prepare(buffers, [cuda_graph.Size(64, 9)])
    assert not passes.graphs
    assert "not permitted when stream is capturing" in caplog.text


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
        assert not gc.isenabled(), "no old graph is destroyed meanwhile"
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    passes = CapturedPasses(tiny_model)
    backend = LookaheadBackend(tiny_model, LIMITS.token_budget, LIMITS.max_live, passes)
    passes.prepare(backend._buffers, backend._sizes)
    assert gc.isenabled()
    gc.collect()
    assert len(Recording.alive) == 1, "whoever failed may be asked for by the allocator yet"
    backend._prepared = True
    monkeypatch.setattr(cuda_graph, "one_pass", real_one_pass)
    rng = random.Random(2)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(10)]
    check_against_the_reference(tiny_model, jobs, run_all(backend, jobs, rng))
    assert "one kernel at a time: operation not permitted" in caplog.text


@pytest.mark.usefixtures("graphs_on_cpu")
def test_a_capture_that_fails_is_the_last_and_those_before_it_go(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = torch.cuda.graph

    def graph(graph: Recording, **settings: Any) -> Any:
        if Recording.made == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return recording(graph, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "graph", graph)
    sizes = [cuda_graph.Size(64, 9), cuda_graph.Size(96, 9), cuda_graph.Size(128, 9)]
    passes, buffers = CapturedPasses(tiny_model), Buffers.of(tiny_model, 128, 9)
    passes.prepare(buffers, sizes)
    launched: list[int] = []
    monkeypatch.setattr(cuda_graph, "one_pass", lambda _model, _buffers, bucket: launched.append(bucket.n_rows))
    for size in sizes:
        passes(buffers, passes._any_batch(buffers, size))
    assert launched == [64, 96, 128]
    assert Recording.made == 2
    gc.collect()
    [failed] = Recording.alive
    assert failed in cuda_graph._FAILED, "the allocator may ask for it"


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
def test_passes_that_come_and_go_never_get_the_stream_of_those_that_serve(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch hands out a card's 32 streams in turn, and frees the workspace of a graph's stream when the graph goes."""
    in_turn = cycle(range(32))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: next(in_turn))
    serving = CapturedPasses(tiny_model)
    for _ in range(40):  # as at reloads of a file that turns out to be unfit
        assert CapturedPasses(tiny_model)._stream != serving._stream
    side_by_side = [CapturedPasses(tiny_model) for _ in range(31)]
    assert len({passes._stream for passes in (serving, *side_by_side)}) == 32
    with pytest.raises(ValueError, match="cpu has 32 streams, all taken: want fewer replicas"):
        CapturedPasses(tiny_model)
    del side_by_side
    CapturedPasses(tiny_model)


@pytest.mark.usefixtures("graphs_on_cpu")
def test_no_memory_for_a_pass_is_said_by_the_tick(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [cuda_graph.Size(64, 9), cuda_graph.Size(96, 9)]
    passes, buffers = CapturedPasses(tiny_model), Buffers.of(tiny_model, 96, 9)
    works = cuda_graph.one_pass

    def short(model: RDT, buffers: Buffers, bucket: Bucket) -> None:
        if bucket.n_rows == 96:
            raise torch.OutOfMemoryError("CUDA out of memory")
        works(model, buffers, bucket)

    emptied: list[list[int]] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(list(passes.graphs)))
    monkeypatch.setattr(cuda_graph, "one_pass", short)
    passes.prepare(buffers, sizes)
    assert list(passes.graphs) == [64]
    assert emptied == [[]], "what the largest took in vain is there for the others"
    bucket = passes._any_batch(buffers, sizes[1])
    with pytest.raises(torch.OutOfMemoryError):
        passes(buffers, bucket)
    monkeypatch.setattr(cuda_graph, "one_pass", works)
    passes(buffers, bucket)
    assert list(passes.graphs) == [64, 96], "there is memory again"


@pytest.mark.usefixtures("graphs_on_cpu")
def test_a_pass_that_fails_for_another_reason_is_a_defect_while_warming_too(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda_graph, "one_pass", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        CapturedPasses(tiny_model).prepare(Buffers.of(tiny_model, 64, 9), [cuda_graph.Size(64, 9)])


def test_results_of_a_card_are_copied_to_pinned_memory_and_waited_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[tuple[object, ...]] = []

    class Copy:
        def copy_(self, tensor: Any, non_blocking: bool = False) -> None:
            happened.append(("copy", tensor.shape, non_blocking))

    class Event:
        def __init__(self, **_: Any) -> None:
            pass

        def record(self) -> None:
            happened.append(("record",))

        def synchronize(self) -> None:
            happened.append(("wait",))

    made: list[tuple[object, ...]] = []

    def empty(shape: Any, *, dtype: torch.dtype, pin_memory: bool = False) -> Copy:
        made.append((shape, dtype, pin_memory))
        return Copy()

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    level, reason = (SimpleNamespace(is_cuda=True, shape=(n,), dtype=torch.float32) for n in (3, 4))
    copies, done = to_host(level, reason)  # type: ignore[arg-type]
    assert len(copies) == 2
    assert made == [((3,), torch.float32, True), ((4,), torch.float32, True)]
    assert happened == [("copy", (3,), True), ("copy", (4,), True), ("record",)], "nothing is waited for yet"
    done()
    assert happened[3:] == [("wait",)]


def test_a_tick_runs_on_the_card_of_its_model(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's own choice is the first card, and streams and events are those of the card that is chosen."""
    chosen: list[torch.device] = []

    @contextlib.contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        chosen.append(device)
        yield
        chosen.clear()

    class Passes(PlainPasses):
        def __call__(self, buffers: Buffers, bucket: Bucket) -> None:
            assert chosen == [tiny_model.device]
            super().__call__(buffers, bucket)

    assert lookahead.on_device(torch.device("cuda:1")).idx == 1  # type: ignore[attr-defined]
    monkeypatch.setattr(lookahead, "on_device", on_device)
    rng = random.Random(0)
    run_all(LookaheadBackend(tiny_model, 80, 8, Passes(tiny_model)), [random_job(rng, 30) for _ in range(5)], rng)
