"""The use case with the tiny model: what is restored, what is kept, what is told about it."""

from __future__ import annotations

import asyncio
import re
import threading
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdt_core import RDT, Encoding, ModelConfig, Tokenizer
from rdt_core.tokenizer import LONG_TEXT
from service.engine.reference import run_reference
from service.engine.types import Job, Result
from service.errors import DeadlineExceeded, InvalidArgument, TooLarge
from service.schema import OPTIONS, DenoiseAnswer
from service.text import hide
from tests.fakes import Service

MASK = re.compile(r"\[mask\]", re.IGNORECASE)


@pytest.fixture
def real(service: Service, tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> Service:
    """The fake engine's place taken by the tiny model."""

    async def submit(job: Job, *_: object) -> Result:
        return run_reference(tiny_model, job)

    monkeypatch.setattr(service.engine, "submit", submit)
    return service


async def ask(service: Service, text: str, **options: object) -> DenoiseAnswer:
    return await service.denoiser.denoise(service.denoiser.read({"text": text, **options}), "rest")


def check_kept(text: str, answer: DenoiseAnswer) -> None:
    """Taking the restored words out of the answer leaves the visible text, and spaces between words at most."""
    kept, read = [], 0
    for restored in answer.restored:
        assert answer.text[restored.start : restored.end] == restored.text
        kept.append(answer.text[read : restored.start])
        read = restored.end
    kept.append(answer.text[read:])
    visible = MASK.split(text)
    assert [kept[0], kept[-1]] == [visible[0], visible[-1]]
    for mine, theirs in zip(kept, visible, strict=True):
        assert mine == theirs or (mine, theirs) == (" ", ""), "only masks side by side are set apart"


@pytest.mark.parametrize(
    "text",
    [
        "The Quick  BROWN [MASK], jumps!",
        "[MASK]",
        "[MASK] fox",
        "fox [MASK]",
        "[mask][Mask][MASK]",
        "[MASK] [MASK]\t[MASK]",
        "Café 😀 naïve\n\n  [MASK]\r\nend ",
        "  leading, trailing [MASK]  ",
        "한글 [MASK] 漢字",
        "a[MASK]b",
    ],
)
@pytest.mark.parametrize("halting", ["gate", "settle"])
async def test_visible_characters_stay_as_sent(real: Service, text: str, halting: str) -> None:
    answer = await ask(real, text, halting=halting)
    check_kept(text, answer)
    assert len(answer.restored) == len(MASK.findall(text))
    assert not MASK.search(answer.text)


words = st.sampled_from(["[MASK]", "[mask]", "Fox", " ", "  ", "\n", "é", "😀", "dog.", "[", "mask]", "#", "한"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(words, min_size=1, max_size=5))  # "mask]" is five tokens to the tiny tokenizer, of 32
async def test_visible_characters_stay_as_sent_whatever_they_are(real: Service, pieces: list[str]) -> None:
    text = "x" + "".join(pieces)
    check_kept(text, await ask(real, text))


async def test_text_without_a_mask_takes_one_pass_and_stays(real: Service) -> None:
    answer = await ask(real, "The quick  Brown fox.")
    assert (answer.text, answer.steps, answer.restored) == ("The quick  Brown fox.", 1, [])


async def test_restore_all_rewrites_what_the_model_reads_differently(service: Service) -> None:
    answer = await ask(service, "The Fox [MASK].", restore="all")
    assert answer.text == "fox Fox foxfox"  # the fake reads every token as fox; "Fox" is one already
    assert [answer.text[r.start : r.end] for r in answer.restored] == ["fox", "fox", "fox"]
    assert [r.start for r in answer.restored] == [0, 8, 11]


async def test_restore_all_with_the_model(real: Service) -> None:
    answer = await ask(real, "The quick 한글 [MASK]", restore="all", top_k=2)
    assert all(answer.text[r.start : r.end] == r.text for r in answer.restored)
    assert all(r.candidates[0].text == r.text for r in answer.restored)
    assert all(len(r.candidates) == 2 for r in answer.restored)


async def test_trace_and_candidates(real: Service) -> None:
    answer = await ask(real, "The [MASK]", trace=True, top_k=3, max_steps=4, threshold=0)
    assert answer.trace is not None
    assert [point.step for point in answer.trace] == [1, 2, 3, 4]
    assert answer.trace[-1].level == answer.level
    assert (answer.steps, answer.max_steps, answer.halt_reason) == (4, 4, "max_steps")
    shares = [candidate.probability for candidate in answer.restored[0].candidates]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == answer.restored[0].probability
    plain = await ask(real, "The [MASK]")
    assert (plain.trace, plain.restored[0].candidates) == (None, [])


async def test_server_side_masking_is_reproducible_and_shown(real: Service) -> None:
    text = "The quick brown fox jumps over the lazy dog."
    first, again = [await ask(real, text, mask_ratio=0.5, seed=3) for _ in range(2)]
    default, *others = [await ask(real, text, mask_ratio=0.5, seed=seed) for seed in (None, 0, 1)]
    assert first.corrupted_text is not None
    assert (first.corrupted_text, first.text) == (again.corrupted_text, again.text)
    assert len({answer.corrupted_text for answer in (first, *others)}) == 3
    assert default.corrupted_text == others[0].corrupted_text
    assert len(first.restored) == first.corrupted_text.count("[MASK]") == 6  # half of 11 tokens, rounded up
    check_kept(first.corrupted_text, first)
    by_hand = await ask(real, first.corrupted_text)
    assert by_hand.text == first.text


@pytest.mark.parametrize(("ratio", "n_masked"), [(0.0, 0), (1.0, 4)])
async def test_masking_nothing_and_everything(real: Service, ratio: float, n_masked: int) -> None:
    answer = await ask(real, "the quick brown fox", mask_ratio=ratio)
    assert answer.corrupted_text is not None
    assert answer.corrupted_text.count("[MASK]") == n_masked
    assert len(answer.restored) == n_masked


async def test_masking_adds_to_the_masks_sent(real: Service) -> None:
    answer = await ask(real, "the [MASK] fox", mask_ratio=1.0)
    assert answer.corrupted_text == "[MASK] [MASK] [MASK]"
    assert (await ask(real, "the [MASK] fox")).corrupted_text is None


def test_a_character_that_is_several_tokens_is_masked_once(tiny_tokenizer: Tokenizer) -> None:
    """A Hangul syllable, for one, is normalised to two or three letters, each a token on the same character."""
    split = Encoding("가b", [2, 40, 41, 42, 3], [(0, 0), (0, 1), (0, 1), (1, 2), (2, 2)], [False] * 5)
    hidden = hide(split, tiny_tokenizer, ratio=1.0, seed=0)
    assert hidden.text == "[MASK][MASK]"
    assert hidden.ids == [2, tiny_tokenizer.mask_id, tiny_tokenizer.mask_id, 3]
    assert hide(split, tiny_tokenizer, ratio=0.0, seed=0) == split


@settings(max_examples=200)
@given(
    st.text(max_size=30) | st.lists(st.sampled_from(["[MASK]", "Foxes", "jumps", "é", " ", "."])).map("".join),
    st.data(),
)
def test_hiding_changes_nothing_but_what_it_hides(tiny_tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    """Read anew, a text with masks inside of words would be other tokens, and more of them than the caller sent."""
    encoding = tiny_tokenizer.encode(text)
    ratio, seed = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 99))
    hidden = hide(encoding, tiny_tokenizer, ratio, seed)
    assert len(hidden.ids) == len(hidden.spans) == len(hidden.masked) <= len(encoding.ids)
    visible = [token for token, masked in zip(hidden.ids, hidden.masked, strict=True) if not masked]
    sent = iter(encoding.ids)
    assert all(token in sent for token in visible), "in their order"
    for (start, end), masked in zip(hidden.spans[1:-1], hidden.masked[1:-1], strict=True):
        assert masked == (MASK.fullmatch(hidden.text[start:end]) is not None)
    assert hidden.masked == [token == tiny_tokenizer.mask_id for token in hidden.ids]
    assert MASK.sub("", hidden.text).count(" ") <= text.count(" ")


async def test_a_text_that_fits_fits_with_any_of_its_tokens_hidden(real: Service) -> None:
    for seed in range(10):
        answer = await ask(real, "jumped " * 15, mask_ratio=0.5, seed=seed)  # 32 tokens: two a word
        assert answer.corrupted_text is not None


async def test_control_tokens_typed_by_a_caller_are_text(real: Service) -> None:
    answer = await ask(real, "[SEP] [CLS] [MASK]")
    assert answer.text.startswith("[SEP] [CLS] ")


async def test_what_is_wrong_with_the_text_is_said(service: Service) -> None:
    with pytest.raises(TooLarge, match="34 tokens: want at most 32 tokens, with the two that frame every text"):
        await ask(service, "a " * 32)
    with pytest.raises(InvalidArgument, match="at least one token"):
        await ask(service, "\u200b\u200b")


async def test_the_metrics_of_a_known_load(service: Service) -> None:
    for _ in range(3):
        await ask(service, "The quick [MASK] [MASK]")  # 6 tokens, 2 of them masked; 2 passes
    service.engine.error = DeadlineExceeded("late")
    with pytest.raises(DeadlineExceeded):
        await ask(service, "a")
    service.engine.live, service.engine.waiting = 1, 4
    expected = {
        ("rdt_requests_total", "rest", "ok"): 3,
        ("rdt_requests_total", "rest", "deadline_exceeded"): 1,
    }
    for (name, transport, outcome), value in expected.items():
        assert service.sample(name, transport=transport, outcome=outcome) == value
    assert service.sample("rdt_passes_total") == 6
    assert service.sample("rdt_tokens_total", kind="masked") == 6
    assert service.sample("rdt_tokens_total", kind="visible") == 12
    assert service.sample("rdt_halts_total", reason="gate") == 3
    assert service.sample("rdt_steps_taken_sum") == 6
    assert service.sample("rdt_steps_taken_bucket", le="1.0") == 0
    assert service.sample("rdt_steps_taken_bucket", le="2.0") == 3
    assert service.sample("rdt_queue_duration_seconds_sum") == 0.75
    assert service.sample("rdt_request_duration_seconds_count") == 3
    assert (service.sample("rdt_live_requests"), service.sample("rdt_waiting_requests")) == (1, 4)


async def test_timing_is_measured_from_arrival(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = service.engine.submit

    async def slow(job: Job, place: object, _on_reading: object) -> Result:
        service.clock.now += 0.9
        return replace(await submit(job, place), queue_seconds=0.2, compute_seconds=0.7)  # type: ignore[arg-type]

    monkeypatch.setattr(service.engine, "submit", slow)
    timing = (await ask(service, "a")).timing_ms
    assert (timing.queue, timing.compute, timing.total) == (200.0, 700.0, pytest.approx(900.0))


@pytest.mark.parametrize("n_batches", [1, 8])
async def test_long_batches_leave_others_their_turn(
    service: Service, monkeypatch: pytest.MonkeyPatch, n_batches: int
) -> None:
    """Tokenising is the event loop's own work: batches of long texts would stop everybody, probes too."""
    turns, began = 0, []
    encode = Tokenizer.encode

    def noted(tokenizer: Tokenizer, text: str) -> Encoding:
        began.append(turns)
        return encode(tokenizer, text)

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    running = asyncio.create_task(other())
    items = [service.denoiser.read({"text": "a [MASK]"}) for _ in range(64)]
    ends = await asyncio.gather(*(service.denoiser.denoise_batch(items, "rest") for _ in range(n_batches)))
    running.cancel()
    assert all(isinstance(end, DenoiseAnswer) for batch in ends for end in batch)
    assert max(began.count(turn) for turn in began) <= 2


async def test_a_long_text_is_tokenised_beside_the_event_loop(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some take a third of a second; and a reload waits until they are on their way to the engine."""
    encode, may_go_on, threads = Tokenizer.encode, threading.Event(), []

    def slow(tokenizer: Tokenizer, text: str) -> Encoding:
        threads.append(threading.current_thread())
        if len(text) > LONG_TEXT:
            assert may_go_on.wait(5)
        return encode(tokenizer, text)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    await ask(service, "a [MASK]")
    asking = asyncio.create_task(ask(service, f"a [MASK]{' ' * LONG_TEXT}"))
    handing_in = asyncio.create_task(service.denoiser.handed_in())
    await asyncio.sleep(0.05)
    assert not handing_in.done()
    may_go_on.set()
    await handing_in
    assert len(service.engine.jobs) == 2, "it has reached the engine"
    assert (await asking).steps == 2
    assert threads[0] is threading.main_thread() is not threads[1]


async def test_an_answer_that_comes_too_late_for_the_transport_is_none(service: Service) -> None:
    service.engine.held = asyncio.Event()
    request = service.denoiser.read({"text": "a [MASK]"})
    with pytest.raises(DeadlineExceeded):
        await service.denoiser.denoise(request, "grpc", cut_at=asyncio.get_running_loop().time() + 0.01)
    assert service.engine.n_left == 1
    assert service.sample("rdt_requests_total", transport="grpc", outcome="deadline_exceeded") == 1


async def test_null_is_what_is_not_given(service: Service) -> None:
    """The same job, and the same answer: nothing of it asked for."""
    given, nulls = await ask(service, "a [MASK]"), await ask(service, "a [MASK]", **dict.fromkeys(OPTIONS))
    assert service.engine.jobs[0] == service.engine.jobs[1]
    assert (nulls.text, nulls.trace, nulls.corrupted_text) == (given.text, None, None)


async def test_what_is_asked_for_goes_before_what_the_model_would_do(service: Service) -> None:
    await ask(service, "a [MASK]", max_steps=3, threshold=0.0, halting="settle", top_k=2, timeout_ms=250)
    [job] = service.engine.jobs
    assert (job.max_steps, job.threshold, job.halting, job.top_k) == (3, 0.0, "settle", 2)
    assert job.deadline == service.clock.now + 0.25


@pytest.mark.parametrize(("timeout_ms", "seconds_left"), [(250, 9.0), (9000, 0.25)])
async def test_of_two_deadlines_the_nearer_counts(service: Service, timeout_ms: int, seconds_left: float) -> None:
    request = service.denoiser.read({"text": "a [MASK]", "timeout_ms": timeout_ms})
    await service.denoiser.denoise(request, "grpc", seconds_left)
    assert service.engine.jobs[0].deadline == service.clock.now + 0.25


async def test_items_of_a_batch_that_were_never_begun_are_counted(service: Service) -> None:
    items = [service.denoiser.read({"text": "a [MASK]"}) for _ in range(64)]
    batch = asyncio.create_task(service.denoiser.denoise_batch(items, "rest"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    counted = sum(
        service.metrics.registry.get_sample_value("rdt_requests_total", {"transport": "rest", "outcome": outcome}) or 0
        for outcome in ("ok", "cancelled")
    )
    assert counted == 64


async def test_a_model_that_asks_for_more_passes_than_are_allowed_gets_those(
    tiny_tokenizer: Tokenizer, tiny_config: ModelConfig
) -> None:
    service = Service(tiny_tokenizer, replace(tiny_config, max_steps=1000))
    service.open()
    assert service.denoiser.limits.max_steps < 1000
    await ask(service, "a [MASK]")
    assert service.engine.jobs[0].max_steps == service.denoiser.limits.max_steps
