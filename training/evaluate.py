"""`python -m training.evaluate --checkpoint F --text F`: how well a model restores text, and at what cost.

The text is cut into segments of one length; each has one random order of masking, so the masks of the
mask ratios are nested and the same for every model. For every mask ratio three kinds of rows:

- fixed depth: every sequence takes the same number of passes;
- gate: every sequence stops when its level falls below a threshold;
- settle: masked tokens are written back at an even pace over a number of passes.

Fixed depths and gates are read off the same passes, so they are compared on equal terms. Exact match
is over masked tokens, with a 95 % interval from the spread between segments; bits are per masked
token; passes are per sequence; FLOPs are per token of text and count the model's matrices only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rdt_core import checkpoint, flops, masking
from rdt_core.checkpoint import CheckpointError
from rdt_core.model import RDT
from rdt_core.packing import Packing
from rdt_core.tokenizer import Tokenizer
from training.config import ConfigError
from training.data import local_corpus, stable_seed
from training.losses import surest
from training.report import Row, format_table, plot

MASK_RATIOS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2)
SETTLE_PASSES = (2, 4, 8, 16)

Slice = tuple[int, Tensor, Tensor, Tensor, Packing]  # number of its first segment, tokens, masked, targets, layout


class Measured(NamedTuple):
    """Scores of `S` segments with `M` masked tokens in all."""

    correct: Tensor  # (..., M) 1 where the best guess is the text
    nats: Tensor  # (..., M) negative log-likelihood of the text
    segments: Tensor  # (M,) which segment a masked token belongs to


def cut_segments(tokens: Tensor, tokenizer: Tokenizer, length: int, at_most: int | None) -> list[Tensor]:
    """Contiguous segments of `length` tokens, `[CLS]` and `[SEP]` included; `at_most` of them, evenly spread."""
    body = length - 2
    n = len(tokens) // body
    if n == 0:
        raise ConfigError(f"--text has {len(tokens)} tokens: want at least --length = {length}")
    chosen = range(n) if at_most is None or at_most >= n else [i * n // at_most for i in range(at_most)]
    ends = torch.tensor([tokenizer.cls_id]), torch.tensor([tokenizer.sep_id])
    return [torch.cat((ends[0], tokens[i * body : (i + 1) * body], ends[1])) for i in chosen]


class Evaluation:
    """Runs a model over masked segments, `batch_size` at a time."""

    def __init__(
        self, model: RDT, tokenizer: Tokenizer, segments: list[Tensor], seed: int, batch_size: int = 16
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.targets = torch.stack(segments).to(model.device)  # (S, L)
        self.ranks = torch.stack([self._order(segment, seed, i) for i, segment in enumerate(segments)]).to(model.device)

    @torch.no_grad()
    def depths(self, mask_ratio: float, max_depth: int) -> tuple[Measured, Tensor]:
        """Every depth from 1 to `max_depth`: scores `(max_depth, M)` and levels `(max_depth, S)`."""
        correct, nats, levels, segments = [], [], [], []
        for first, tokens, masked, targets, packing in self._batches(mask_ratio):
            state = self.model.begin(tokens, masked, packing)
            rows = masked.nonzero().squeeze(1)
            scores, seen = [], []
            for _ in range(max_depth):
                state = self.model(state, packing)
                scores.append(self._score(state.hidden, packing, rows, targets[rows])[:2])
                seen.append(state.gate.level)
            correct.append(torch.stack([score[0] for score in scores]))
            nats.append(torch.stack([score[1] for score in scores]))
            levels.append(torch.stack(seen))
            segments.append(packing.sequence_ids[rows] + first)
        return Measured(torch.cat(correct, 1), torch.cat(nats, 1), torch.cat(segments)), torch.cat(levels, 1)

    @torch.no_grad()
    def settling(self, mask_ratio: float, n_passes: int) -> Measured:
        """Settle the surest tokens at an even pace over `n_passes`: each is scored when it is written."""
        parts = []
        for first, tokens, masked, targets, packing in self._batches(mask_ratio):
            state = self.model.begin(tokens, masked, packing)
            all_rows = masked.nonzero().squeeze(1)
            for step in range(1, n_passes + 1):
                state = self.model(state, packing)
                rows = all_rows[surest(state, all_rows, packing, step, n_passes)]
                correct, nats, guess = self._score(state.hidden, packing, rows, targets[rows])
                parts.append(Measured(correct, nats, packing.sequence_ids[rows] + first))
                state = self.model.settle(state, rows, guess)
        return Measured(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _order(self, segment: Tensor, seed: int, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(stable_seed(seed, index))
        return masking.mask_ranks(masking.maskable_rows(segment, self.tokenizer.special_ids), generator)

    def _batches(self, mask_ratio: float) -> Iterator[Slice]:
        for first in range(0, len(self.targets), self.batch_size):
            targets = self.targets[first : first + self.batch_size]
            packing = Packing.of([targets.shape[1]] * len(targets), self.model.device)
            masked = masking.masked_at(self.ranks[first : first + self.batch_size], mask_ratio).flatten()
            tokens = masking.corrupt(targets.flatten(), masked, self.tokenizer.mask_id)
            yield first, tokens, masked, targets.flatten(), packing

    def _score(self, hidden: Tensor, packing: Packing, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.model.decode(hidden, packing, rows).float()
        guess = logits.argmax(-1)
        return (guess == targets).double(), F.cross_entropy(logits, targets, reduction="none").double(), guess


def halting_depths(levels: Tensor, threshold: float) -> Tensor:
    """levels `(P, S)` -> the pass `(S,)` after which each sequence halts, 1 to P."""
    below = levels < threshold
    first = below.int().argmax(0) + 1
    return torch.where(below.any(0), first, len(levels))


def evaluate(
    evaluation: Evaluation,
    mask_ratios: Sequence[float] = MASK_RATIOS,
    max_depth: int = 16,
    thresholds: Sequence[float] = THRESHOLDS,
    settle_passes: Sequence[int] = SETTLE_PASSES,
) -> list[Row]:
    """The whole table."""
    rows: list[Row] = []
    for ratio in tqdm(mask_ratios, desc="mask ratios", disable=None):
        scores, levels = evaluation.depths(ratio, max_depth)
        n_segments = levels.shape[1]
        for depth in range(1, max_depth + 1):
            steps = torch.full((n_segments,), depth)
            rows.append(_row(evaluation, ("fixed", depth, ratio), _at_depth(scores, steps), steps))
        for threshold in thresholds:
            steps = halting_depths(levels, threshold).cpu()
            rows.append(_row(evaluation, ("gate", threshold, ratio), _at_depth(scores, steps), steps))
        for n_passes in settle_passes:
            settled = evaluation.settling(ratio, n_passes)
            steps = torch.bincount(settled.segments, minlength=n_segments).clamp(max=n_passes).cpu()
            rows.append(_row(evaluation, ("settle", n_passes, ratio), settled, steps))
    return rows


def _at_depth(scores: Measured, steps: Tensor) -> Measured:
    depth = (steps.to(scores.segments.device)[scores.segments] - 1)[None]
    return Measured(scores.correct.gather(0, depth)[0], scores.nats.gather(0, depth)[0], scores.segments)


def _row(evaluation: Evaluation, point: tuple[str, float, float], scores: Measured, steps: Tensor) -> Row:
    n_segments, length = evaluation.targets.shape
    masks = torch.bincount(scores.segments, minlength=n_segments).cpu()
    hits = torch.bincount(scores.segments, weights=scores.correct, minlength=n_segments).cpu()
    exact = (hits.sum() / masks.sum()).item()
    spread = ((hits - exact * masks) ** 2).sum().sqrt().item() / masks.sum().item()
    config = evaluation.model.config
    work = sum(
        flops.sequence_flops(config, length, decoded, passes)
        for decoded, passes in zip(masks.tolist(), steps.tolist(), strict=True)
    )
    return Row(
        *point,
        exact_match=exact,
        interval=1.96 * spread,
        bits=scores.nats.mean().item() / math.log(2),
        passes=steps.double().mean().item(),
        flops_per_token=work / (n_segments * length),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rdt-evaluate", description="Evaluate a checkpoint on masked text.")
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--text", required=True, help="local .txt or .txt.xz file")
    parser.add_argument("--output", type=Path, help="folder for evaluation.json, .txt and .png")
    parser.add_argument("--length", type=int, default=128, help="tokens a segment (default: %(default)s)")
    parser.add_argument("--segments", type=int, help="how many segments, evenly spread (default: all)")
    parser.add_argument("--mask-ratios", type=float, nargs="+", default=MASK_RATIOS)
    parser.add_argument("--max-depth", type=int, default=16)
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--settle-passes", type=int, nargs="*", default=SETTLE_PASSES)
    parser.add_argument("--seed", type=int, default=0, help="of the masks (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache-dir", default="runs/cache")
    options = parser.parse_args(arguments)
    try:
        loaded = checkpoint.load(options.checkpoint, options.device)
        tokens = torch.from_numpy(
            local_corpus(options.text, loaded.tokenizer, options.cache_dir).tokens.astype("int64")
        )
        segments = cut_segments(tokens, loaded.tokenizer, options.length, options.segments)
        evaluation = Evaluation(loaded.model, loaded.tokenizer, segments, seed=options.seed)
        rows = evaluate(evaluation, options.mask_ratios, options.max_depth, options.thresholds, options.settle_passes)
    except (ConfigError, CheckpointError) as error:
        print(f"rdt-evaluate: {error}", file=sys.stderr)
        return 2
    table = format_table(rows)
    print(table)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        summary = {"model": loaded.name, "digest": loaded.digest, "segments": len(segments), "length": options.length,
                   "seed": options.seed, "rows": [asdict(row) for row in rows]}  # fmt: skip
        (options.output / "evaluation.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (options.output / "evaluation.txt").write_text(table + "\n", encoding="utf-8")
        plot(rows, options.output / "evaluation.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
