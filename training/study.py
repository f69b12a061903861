"""`python -m training.study --arm NAME --seed N --start FILE`: one arm of the recipe study, trained and measured.

Every arm starts from the same one-pass model, sees the same batches and masks, and is measured on the same masked
validation text: exact match after fixed depths, and when written back over rounds of settling (surest first, one pass a
round, state carried on). Figures go to `training/LOG.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from rdt_core.model import RDT, State
from rdt_core.packing import Packing
from training import losses
from training.config import TrainConfig, load_config
from training.data import Batch, local_corpus
from training.evaluation import restoring, tallies
from training.evaluation.measures import runs
from training.evaluation.restoring import Evaluation, cut_segments
from training.evaluation.table import Judge, Point
from training.losses import Losses
from training.mixed_precision import autocast
from training.trainer import Trainer
from training.vocabulary import vocabulary_loss

DEPTHS = (1, 2, 3, 4, 6, 8, 12)
ROUNDS = (4, 12)
RATIOS = (0.15, 0.5)
EMA = 0.99

Forward = Callable[[RDT, State, Packing], State]
Loss = Callable[["Study", Batch, Packing, int], Tensor]


# --- how a pass starts -------------------------------------------------------------------------------------------


def _pass(model: RDT, state: State, packing: Packing, x: Tensor) -> State:
    hidden = model._layers(model.encoder, x, packing)
    return state._replace(hidden=hidden, gate=model.gate(hidden, state.masked, packing, state.gate))


def first(state: State) -> bool:
    """Before the first pass: all arms make that one alike, as the model they start from does."""
    return bool((state.gate.level == 1).all())


def start_of(model: RDT, state: State) -> Tensor:
    return model.hidden_norm(state.hidden) + model.inject(state.embedded)


def no_feedback(model: RDT, state: State, packing: Packing) -> State:
    return _pass(model, state, packing, start_of(model, state) if first(state) else state.hidden)


def norm_only(model: RDT, state: State, packing: Packing) -> State:
    return _pass(model, state, packing, start_of(model, state) if first(state) else model.hidden_norm(state.hidden))


def no_norm(model: RDT, state: State, packing: Packing) -> State:
    x = start_of(model, state) if first(state) else state.hidden + model.inject(state.embedded)
    return _pass(model, state, packing, x)


# --- what is learnt ----------------------------------------------------------------------------------------------


def head_loss(model: RDT, features: Tensor, targets: Tensor) -> Tensor:
    return vocabulary_loss(features, model.embedding.weight, model.output_bias, targets)


def distilled(study: Study, batch: Batch, packing: Packing, n_passes: int) -> Tensor:
    """The random unroll, and the first of the supervised passes also learns the last one's whole distribution."""
    model, n_grad = study.model, study.config.training.grad_passes
    states = model.recursive_forward(batch.tokens, batch.masked, packing, n_passes, n_grad)[-n_grad:]
    rows = batch.masked.nonzero().squeeze(1)
    features = [model.features(s.hidden, packing, rows) for s in states]
    loss = head_loss(model, torch.cat(features), batch.targets[rows].repeat(len(features)))
    if len(features) == 1:
        return loss
    early, late = (F.linear(f, model.embedding.weight, model.output_bias) for f in (features[0], features[-1].detach()))
    apart = F.kl_div(early.float().log_softmax(-1).clamp(min=-50), late.detach().float().softmax(-1), reduction="sum")
    return loss + 0.5 * apart / max(len(rows), 1)


def settling(guess_of: str) -> Loss:
    """Between passes an even share of the open tokens becomes visible; those still open are supervised.

    `own`: the surest, as the model's own best guess. `truth`: any, as the text has them. `soft`: nothing is settled,
    the mean embedding under the model's ten best guesses is added to every open token's input.
    """

    def loss(study: Study, batch: Batch, packing: Packing, n_passes: int) -> Tensor:
        model, n_grad = study.model, study.config.training.grad_passes
        state = model.begin(batch.tokens, batch.masked, packing)
        total = torch.zeros((), device=study.device)
        supervised = 0
        for step in range(1, n_passes + 1):
            graded = step > n_passes - n_grad
            with torch.set_grad_enabled(graded):
                state = model(state, packing)
            rows = state.masked.nonzero().squeeze(1)
            if graded and len(rows):
                features = model.features(state.hidden, packing, rows)
                total = total + head_loss(model, features, batch.targets[rows])
                supervised += 1
            if step < n_passes and len(rows):
                state = advance(model, state, packing, batch, rounds_left=n_passes - step + 1, how=guess_of)
        return total / max(supervised, 1)

    return loss


def advance(model: RDT, state: State, packing: Packing, batch: Batch, *, rounds_left: int, how: str) -> State:
    rows = state.masked.nonzero().squeeze(1)
    if how == "truth":
        kept = torch.rand(len(rows)) < 1 / rounds_left
        return model.settle(state, rows[kept], batch.targets[rows[kept]])
    with torch.no_grad():
        logits = model.decode(state.hidden.detach(), packing, rows)
    if how == "soft":
        return soften(model, state, rows, logits)
    sure, guess = logits.max(-1)[0] - logits.float().logsumexp(-1), logits.argmax(-1)
    chosen = surest_rows(sure, packing.sequence_ids[rows], rounds_left, packing.n_sequences)
    return model.settle(state, rows[chosen], guess[chosen])


def soften(model: RDT, state: State, rows: Tensor, logits: Tensor) -> State:
    """The inputs of `rows` become half `[MASK]`, half what is expected there."""
    best = logits.float().topk(10, dim=-1)
    weights = best.values.softmax(-1)
    expected = (weights[..., None] * model.embed(best.indices.flatten()).view(*best.indices.shape, -1)).sum(1)
    blank = model.embed(torch.tensor([MASK], device=rows.device))
    mixed = (0.5 * blank + 0.5 * expected).to(state.embedded.dtype)
    return state._replace(embedded=state.embedded.index_copy(0, rows, mixed))


def surest_rows(sure: Tensor, sequences: Tensor, rounds_left: int, n_sequences: int) -> Tensor:
    """In each sequence the `1 / rounds_left` surest, rounded up: their places among the rows."""
    order = torch.argsort(sequences.double() * 1e6 - sure.double(), stable=True)
    counts = torch.bincount(sequences, minlength=n_sequences)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts[sequences[order]]
    due = (counts + rounds_left - 1) // rounds_left
    return (rank < due[sequences]).nonzero().squeeze(1)


MASK = 103

ARMS: dict[str, dict[str, Any]] = {
    "one-pass": {"settings": ["training.max_chain_length=1", "training.grad_passes=1"]},
    "unroll4": {},
    "unroll2": {"settings": ["training.max_chain_length=2"]},
    "unroll8": {"settings": ["training.max_chain_length=8"]},
    "grad1": {"settings": ["training.grad_passes=1"]},
    "grad4": {"settings": ["training.grad_passes=4"]},
    "next-only": {"settings": ["training.scheme=chain", "training.max_chain_length=2", "training.total_steps=16"]},
    "no-feedback": {"forward": no_feedback},
    "norm-only": {"forward": norm_only},
    "no-norm": {"forward": no_norm},
    "level": {"settings": ["model.level_conditioning=true", "training.gate_every_n_steps=4"]},
    "distilled": {"loss": distilled},
    "settle-own": {"loss": settling("own")},
    "settle-truth": {"loss": settling("truth")},
    "soft": {"loss": settling("soft"), "soft": True},
}


# --- what the gate says ------------------------------------------------------------------------------------------


def clock(_study: Study, batch: Batch, packing: Packing, run: losses.DeepRun) -> Tensor:
    """Passes left `(P, N)` by the share of masked tokens alone: as many passes as sixteenths are masked."""
    counts = torch.bincount(packing.sequence_ids[batch.masked], minlength=packing.n_sequences)
    passes = (16 * counts / batch.length).round()
    return (passes[None] - torch.arange(1, len(run.states) + 1)[:, None]).clamp(min=0)


def improvement(study: Study, batch: Batch, packing: Packing, run: losses.DeepRun) -> Tensor:
    """Passes left until a sequence's loss is within 0.01 nats a token of its best to come."""
    rows = batch.masked.nonzero().squeeze(1)
    costs = []
    with torch.no_grad():
        for state in run.states:
            logits = study.model.decode(state.hidden, packing, rows).float()
            nats = F.cross_entropy(logits, batch.targets[rows], reduction="none")
            total = torch.zeros(packing.n_sequences).index_add_(0, packing.sequence_ids[rows], nats)
            costs.append(total / torch.bincount(packing.sequence_ids[rows], minlength=packing.n_sequences).clamp(min=1))
    after = torch.stack(costs)  # (P, N)
    best = after.flip(0).cummin(0)[0].flip(0)
    unsettled = after - best > 0.01
    steps = torch.arange(1, len(after) + 1)[:, None]
    last = (unsettled * steps).amax(0)
    return (last[None] + 1 - steps).clamp(min=0).float()


GATES: dict[str, Any] = {"changes": None, "clock": clock, "improvement": improvement}


class GateStudy(Trainer):
    """Teaches the gate alone, on a finished encoder; `target` in place of "until the predictions stop changing"."""

    target: Any = None

    def _gate_loss(self, batch: Batch, turn: int) -> Tensor:
        some = batch.first(self.config.training.gate_sequences)
        if self.target is None or turn % 2 == 1:
            return super()._gate_loss(batch, turn)
        packing = some.packing(self.device)
        self.model.eval()
        run = losses.deep_run(self.model, some, packing, self.config.training.gate_passes, settle=False)
        left = self.target(self, some, packing, run)
        self.model.train()
        with (
            mock.patch.object(losses, "passes_left", return_value=left),
            mock.patch.object(losses, "deep_run", return_value=run),
        ):
            return losses.gate_losses(self.model, some, packing, self.config.training, settle=False)


def train_gate(config: TrainConfig, target: str, start: Path) -> None:
    """From a checkpoint at the end of the encoder's learning, with the gate as it started, to the run's last step."""
    study = GateStudy(config, torch.device("cpu"), start)
    study.target = GATES[target]
    study.fit()


class Study(Trainer):
    def __init__(self, arm: dict[str, Any], *given: Any, start: Path) -> None:
        super().__init__(*given)
        saved = torch.load(start, map_location="cpu", weights_only=True)["model_state_dict"]
        missing, unexpected = self.model.load_state_dict(saved, strict=False)
        assert not unexpected, unexpected
        new = [name for name in missing if "modulation" not in name and "level_embedding" not in name]
        assert not new, new
        self.loss: Loss | None = arm.get("loss")  # None: the trainer's own
        if "forward" in arm:
            self.model.forward = types.MethodType(arm["forward"], self.model)  # type: ignore[method-assign]
        self.averaged = copy.deepcopy(self.model.state_dict())

    def _losses(self, batch: Batch) -> Losses:
        if self.loss is None:
            return super()._losses(batch)
        packing = batch.packing(self.device)
        with autocast(self.device):
            return Losses(self.loss(self, batch, packing, self._draw_passes()), torch.zeros(()))

    def _train_step(self, batches: list[tuple[int, Batch]]) -> Losses:
        found = super()._train_step(batches)
        for name, value in self.model.state_dict().items():
            self.averaged[name].lerp_(value, 1 - EMA)
        return found


# --- how it is measured ------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(model: RDT, evaluation: Evaluation, soft: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    model.eval()
    for ratio in RATIOS:
        masked = evaluation.masked(ratio)
        fixed: dict[int, list[Tensor]] = {depth: [] for depth in DEPTHS}
        nats: dict[int, float] = dict.fromkeys(DEPTHS, 0.0)
        settled: dict[int, list[Tensor]] = {n: [] for n in ROUNDS}
        for part in evaluation.slices(ratio):
            state = model.begin(part.tokens, part.masked, part.packing)
            for depth in range(1, max(DEPTHS) + 1):
                state = model(state, part.packing)
                if depth in DEPTHS or soft:
                    logits = model.decode(state.hidden, part.packing, part.rows).float()
                    if depth in DEPTHS:
                        fixed[depth].append(logits.argmax(-1) == part.targets[part.rows])
                        nats[depth] += float(F.cross_entropy(logits, part.targets[part.rows], reduction="sum"))
                    if soft:
                        state = soften(model, state, part.rows, logits)
            if soft:
                continue
            for n in ROUNDS:
                state = model.begin(part.tokens, part.masked, part.packing)
                written = part.tokens.clone()
                for step in range(1, n + 1):
                    state = model(state, part.packing)
                    rows = state.masked.nonzero().squeeze(1)
                    if len(rows) == 0:
                        break
                    logits = model.decode(state.hidden, part.packing, rows).float()
                    sure = logits.max(-1)[0] - logits.logsumexp(-1)
                    chosen = surest_rows(sure, part.packing.sequence_ids[rows], n - step + 1, part.packing.n_sequences)
                    written[rows[chosen]] = logits.argmax(-1)[chosen]
                    state = model.settle(state, rows[chosen], logits.argmax(-1)[chosen])
                settled[n].append((written == part.targets)[part.rows])
        found[str(ratio)] = {
            "fixed": {n: scores(masked, torch.cat(hits)) for n, hits in fixed.items()},
            "bits": {n: value / float(masked.sum()) / 0.6931471805599453 for n, value in nats.items()},
            "settle": {n: scores(masked, torch.cat(hits)) for n, hits in settled.items() if hits},
        }
    return found


# --- the pace of settling ----------------------------------------------------------------------------------------


def by_confidence(model: RDT) -> Any:
    """In place of the token level, the probability that the best guess is wrong; decodes every open token."""
    settling_now = restoring._settling_now

    def confident_now(state: State, batch: restoring.Slice, *given: Any, **settings: Any) -> Tensor:
        rows = state.masked.nonzero().squeeze(1)
        sure = model.decode(state.hidden, batch.packing, rows).float().softmax(-1).max(-1)[0]
        levels = state.gate.token_level.index_copy(0, rows, (1 - sure).to(state.gate.token_level.dtype))
        return settling_now(state._replace(gate=state.gate._replace(token_level=levels)), batch, *given, **settings)

    return mock.patch.object(restoring, "_settling_now", confident_now)


@torch.inference_mode()
def paces(evaluation: Evaluation, output: Path) -> None:
    judge, rows = Judge(evaluation, None), []
    kept = []
    for ratio in (0.3, 0.5, 0.7):
        for rule, patch, thresholds in (
            ("level", nullcontext(), (0.05, 0.1, 0.2, 0.4)),
            ("confidence", by_confidence(evaluation.model), (0.1, 0.3, 0.5, 0.7)),
        ):
            with patch:
                for n_passes in (2, 4, 8, 12):
                    point = Point(f"even-{rule}", n_passes, evaluation.settling(ratio, n_passes))
                    kept.append(judge.tallies(ratio, point.outcome))
                    rows.append(judge.row(ratio, point, kept[-1]))
                for threshold in thresholds:
                    point = Point(f"own-{rule}", threshold, evaluation.settling(ratio, 12, threshold))
                    kept.append(judge.tallies(ratio, point.outcome))
                    rows.append(judge.row(ratio, point, kept[-1]))
                    print(rows[-1], flush=True)
    output.mkdir(parents=True, exist_ok=True)
    values = {"model": "paces", "digest": "0" * 64, "rows": [asdict(row) for row in rows]}
    (output / "evaluation.json").write_text(json.dumps(values), encoding="utf-8")
    tallies.write(output / "evaluation.npz", rows, kept)


def scores(masked: Tensor, hits: Tensor) -> dict[str, float]:
    """Shares, in %: of tokens, and of runs of 2 and 3 adjacent ones."""
    correct = torch.zeros_like(masked)
    correct[masked] = hits.cpu()
    row = {"tokens": 100 * float(hits.double().mean())}
    for n in (2, 3):
        right, count = runs(masked, correct, n)
        row[f"runs{n}"] = 100 * float(right.sum() / count.sum().clamp(min=1))
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm", choices=[*ARMS, "none"], default="none")
    parser.add_argument("--gate", choices=[*GATES], help="teach the gate alone, by this target")
    parser.add_argument("--pace", action="store_true", help="measure paces of settling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("training/configs/rdt-small.yaml"))
    parser.add_argument("--segments", type=int, default=150)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("assignments", nargs="*")
    options = parser.parse_intermixed_args()
    arm = ARMS.get(options.arm, {})
    config = load_config(options.config, None, [*options.assignments, *arm.get("settings", []), f"seed={options.seed}"])
    folder = options.output / f"{options.gate or options.arm}-s{options.seed}"
    config = replace(
        config,
        output=replace(config.output, checkpoint_dir=str(folder), log_dir=str(folder / "logs")),
        mixed_precision=True,
    )
    if options.gate is not None:
        train_gate(config, options.gate, options.start)
        return
    study = Study(arm, config, torch.device("cpu"), start=options.start)
    began = time.perf_counter()
    if options.arm != "none":
        study.fit()
    seconds = time.perf_counter() - began
    corpus = local_corpus(options.validation, study.tokenizer, config.data.cache_dir)
    segments = cut_segments(torch.from_numpy(corpus.tokens.astype("int64")), study.tokenizer, 128, options.segments)
    evaluation = Evaluation(study.model, study.tokenizer, segments, 0, 25)
    result = {"arm": options.arm, "seed": options.seed, "seconds": seconds, "steps": study.step}
    if options.pace:
        with autocast(study.device):
            paces(evaluation, folder)
        return
    with autocast(study.device):
        result["last"] = measure(study.model, evaluation, arm.get("soft", False))
        if options.arm in ("unroll4", "one-pass"):
            study.model.load_state_dict(study.averaged)
            result["ema"] = measure(study.model, evaluation, False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
