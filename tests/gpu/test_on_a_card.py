"""What only a card can show. Needs torch, tokenizers, numpy and pytest, and nothing of the rest of the tests."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rdt_core import RDT
from rdt_core.precision import SummedLinear, _linear, prepare
from service.engine.cuda_graph import CapturedPasses, can_capture
from service.engine.eager import EagerBackend
from service.engine.lookahead import LookaheadBackend
from service.engine.reference import run_reference
from tests.service.engine.test_eager import LIMITS, random_job, run_all
from training.config import TrainingSection
from training.data import Batch
from training.losses import unroll_losses
from training.mixed_precision import autocast

pytestmark = pytest.mark.gpu


def capturing(model: RDT) -> tuple[LookaheadBackend, CapturedPasses]:
    if not can_capture(model):
        pytest.skip("this card has no variable-length attention")
    passes = CapturedPasses(model)
    return LookaheadBackend(model, LIMITS.token_budget, LIMITS.max_live, passes), passes


def all_captured(backend: LookaheadBackend, passes: CapturedPasses) -> bool:
    """Else plain passes have been made in their place, and whatever was compared is the same twice."""
    return len(passes.graphs) == len(backend._sizes)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_captured_passes_are_plain_ones(tiny_model: RDT, precision: Any) -> None:
    model = prepare(copy.deepcopy(tiny_model).to("cuda"), precision)
    rng = random.Random(3)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(100)]
    captured, passes = capturing(model)
    plain = LookaheadBackend(model, LIMITS.token_budget, LIMITS.max_live)
    pairs = zip(run_all(captured, jobs, random.Random(4)), run_all(plain, jobs, random.Random(4)), strict=True)
    assert all((ours.tokens, ours.steps) == (theirs.tokens, theirs.steps) for ours, theirs in pairs)
    assert all_captured(captured, passes)


def test_in_float32_answers_are_those_of_the_cpu(tiny_model: RDT) -> None:
    rng = random.Random(7)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(60)]
    model = prepare(copy.deepcopy(tiny_model).to("cuda"), "fp32")
    results = run_all(EagerBackend(model), jobs, random.Random(8))
    for job, result in zip(jobs, results, strict=True):
        alone = run_reference(tiny_model, job)
        assert (result.tokens, result.steps) == (alone.tokens, alone.steps)


def test_logits_are_sums_of_float32() -> None:
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(shape, device="cuda") for shape in ((50, 64), (50,), (20, 64)))
    logits = SummedLinear(_linear(weight, bias), torch.bfloat16)(x)
    exact = x.bfloat16().double() @ weight.bfloat16().double().t() + bias.double()
    assert (logits.double() - exact).abs().max() < 1e-4  # a bfloat16 is off by up to 0.06 here


def test_gradients_are_those_of_the_cpu(tiny_model: RDT) -> None:
    """In bfloat16 against float32, and through the last passes alone: what autocast keeps of the first has none."""
    targets = torch.randint(5, tiny_model.config.vocab_size, (32,), generator=torch.Generator().manual_seed(0))
    masked = torch.arange(32) % 3 == 0
    batch = Batch(targets, targets.masked_fill(masked, 4), masked, masked.long(), torch.ones(2), 16)
    exact, found = (gradients(tiny_model, batch, torch.device(name)) for name in ("cpu", "cuda"))
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        assert torch.cosine_similarity(found[name], gradient, dim=0) > 0.99, name


def gradients(model: RDT, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Of a step of training, flat and on the CPU."""
    model = copy.deepcopy(model).to(device).requires_grad_()
    with autocast(device, device.type == "cuda"):
        unroll_losses(model, batch.to(device), batch.packing(device), 4, TrainingSection(grad_passes=2)).backward()
    return {name: p.grad.flatten().cpu() for name, p in model.named_parameters() if p.grad is not None}


def test_a_tick_waits_for_nothing_but_what_it_reads_back(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the pass that was launched ahead would be waited for, and the card would idle until the next."""
    model = prepare(copy.deepcopy(tiny_model).to("cuda"), "bf16")
    backend, passes = capturing(model)
    rng = random.Random(5)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(60)]
    jobs = [replace(job, halting="gate", stream=False) for job in jobs]  # others are read after every pass
    run_all(backend, jobs, random.Random(6))
    assert all_captured(backend, passes)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", _unwatched(torch.cuda.Event.synchronize))
    with waiting_is_an_error():
        run_all(backend, jobs, random.Random(6))


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _unwatched(wait: Any) -> Any:
    def unwatched(event: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        wait(event)
        torch.cuda.set_sync_debug_mode("error")

    return unwatched
