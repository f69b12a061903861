"""Segments with fixed masks, and the model's own ways of restoring them.

S: segments   L: tokens of one   M: masked tokens of all, segment after segment   P: passes   N, T: of one batch

Every method answers for the same `M` tokens in the same order, so that any two can be compared token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rdt_core import flops, masking
from rdt_core.config import ModelConfig
from rdt_core.halting import due, halt_reason, settled_level, which_settle
from rdt_core.model import RDT
from rdt_core.packing import Packing
from rdt_core.tokenizer import Tokenizer
from training.config import ConfigError
from training.data import stable_seed


class Measured(NamedTuple):
    """Scores of `S` segments with `M` masked tokens in all."""

    correct: Tensor  # (..., M) 1 where the guess is the text
    nats: Tensor  # (..., M) negative log-likelihood of the text where and when the guess was made
    segments: Tensor  # (M,) which segment a masked token belongs to
    guesses: Tensor  # (..., M) the tokens written


class Effort(NamedTuple):
    """What each of `S` segments took, all `(S,)`; the rest of its batch does not count."""

    starts: Tensor  # preludes
    passes: Tensor  # of the shared encoder
    decodes: Tensor  # times the decoder layers ran
    rows: Tensor  # rows through the vocabulary
    shortlisted: Tensor  # rows whose token level had to be asked for

    def flops(self, config: ModelConfig, length: int) -> Tensor:
        """Operations of each segment `(S,)`; as `flops.sequence_flops`, which has one start and one decode."""
        layer = flops.layer_flops(config, length)
        layers = self.starts * config.n_prelude_layers * layer + self.decodes * config.n_coda_layers * layer
        encoder = layers + self.passes * flops.pass_flops(config, length)
        vocabulary = self.rows * flops.decode_flops(config) + self.shortlisted * flops.shortlist_flops(config)
        return (length * encoder + vocabulary).double()


Part = TypeVar("Part", Measured, Effort)


class Outcome(NamedTuple):
    scores: Measured
    effort: Effort


class Slice(NamedTuple):
    """`N` masked segments, packed: T = N x L."""

    first: int  # the number of its first segment
    tokens: Tensor  # (T,) what the model sees
    masked: Tensor  # (T,) bool
    targets: Tensor  # (T,) the text
    packing: Packing

    @property
    def rows(self) -> Tensor:
        return self.masked.nonzero().squeeze(1)

    @property
    def shape(self) -> tuple[int, int]:
        return self.packing.n_sequences, self.packing.lengths[0]

    def measured(self, guesses: Tensor, nats: Tensor) -> Measured:
        """guesses, nats `(..., M)` of this slice's masked rows, in order of position."""
        rows = self.rows
        correct = (guesses == self.targets[rows]).double()
        segments = self.packing.sequence_ids[rows] + self.first
        return Measured(correct.cpu(), nats.double().cpu(), segments.cpu(), guesses.cpu())


def cut_segments(
    tokens: Tensor, tokenizer: Tokenizer, length: int, at_most: int | None, *, named: str = "--text"
) -> list[Tensor]:
    """Contiguous segments of `length` tokens, `[CLS]` and `[SEP]` included; `at_most` of them, evenly spread.

    Raises `ConfigError`, in which the text is called `named`.
    """
    body = length - 2
    n = len(tokens) // body
    if n == 0:
        raise ConfigError(f"{named} has {len(tokens)} tokens: want at least {body}, which with two more are a segment")
    chosen = range(n) if at_most is None or at_most >= n else [i * n // at_most for i in range(at_most)]
    ends = torch.tensor([tokenizer.cls_id]), torch.tensor([tokenizer.sep_id])
    return [torch.cat((ends[0], tokens[i * body : (i + 1) * body], ends[1])) for i in chosen]


class Evaluation:
    """Runs a model over masked segments, `batch_size` at a time.

    The masks depend on the segments, their order and the seed, not on the model or the method; those of a
    smaller mask ratio are among those of a larger one.
    """

    def __init__(
        self, model: RDT, tokenizer: Tokenizer, segments: list[Tensor], seed: int, batch_size: int = 16
    ) -> None:
        self.model, self.tokenizer, self.seed, self.batch_size = model, tokenizer, seed, batch_size
        self.targets = torch.stack(segments).to(model.device)  # (S, L)
        self.ranks = torch.stack([self._order(segment, i) for i, segment in enumerate(segments)]).to(model.device)

    def masked(self, mask_ratio: float) -> Tensor:
        """`(S, L)` bool, on the CPU."""
        return masking.masked_at(self.ranks, mask_ratio).cpu()

    def slices(self, mask_ratio: float) -> Iterator[Slice]:
        for first in range(0, len(self.targets), self.batch_size):
            targets = self.targets[first : first + self.batch_size]
            packing = Packing.of([targets.shape[1]] * len(targets), self.model.device)
            masked = masking.masked_at(self.ranks[first : first + self.batch_size], mask_ratio).flatten()
            tokens = masking.corrupt(targets.flatten(), masked, self.tokenizer.mask_id)
            yield Slice(first, tokens, masked, targets.flatten(), packing)

    @torch.no_grad()
    def depths(self, mask_ratio: float, max_depth: int) -> tuple[Measured, Tensor]:
        """Every depth from 1 to `max_depth`: scores `(max_depth, M)` and levels `(max_depth, S)`."""
        parts, levels = [], []
        for batch in self.slices(mask_ratio):
            state = self.model.begin(batch.tokens, batch.masked, batch.packing)
            guesses, nats, seen = [], [], []
            for _ in range(max_depth):
                state = self.model(state, batch.packing)
                logits = self.model.decode(state.hidden, batch.packing, batch.rows).float()
                guesses.append(logits.argmax(-1))
                nats.append(F.cross_entropy(logits, batch.targets[batch.rows], reduction="none"))
                seen.append(state.gate.level.cpu())
            parts.append(batch.measured(torch.stack(guesses), torch.stack(nats)))
            levels.append(torch.stack(seen))
        return joined(parts), torch.cat(levels, 1)

    @torch.no_grad()
    def settling(self, mask_ratio: float, n_passes: int, threshold: float = 0.0) -> Outcome:
        """Settle as the reference does with `halting="settle"`; each token is scored when it is written.

        With threshold 0 as many of the surest tokens settle as the pace asks for, neighbours apart; above it,
        also every token whose level is below the threshold, and all of them once the sequence's level is.
        """
        parts, efforts = [], []
        for batch in self.slices(mask_ratio):
            state = self.model.begin(batch.tokens, batch.masked, batch.packing)
            guesses, nats = batch.targets.clone(), torch.zeros_like(batch.targets, dtype=torch.float64)
            sequences = [_Settling(int(count)) for count in batch.masked.view(batch.shape).sum(1)]
            step = 0
            while not all(sequence.halted for sequence in sequences):
                step += 1
                state = self.model(state, batch.packing)
                open_rows = state.masked.nonzero().squeeze(1)
                token_level = self.model.token_level(state.hidden, batch.packing, open_rows).cpu()
                owners = batch.packing.sequence_ids[open_rows].cpu()  # ascending, so the sequences' parts can be joined
                places = open_rows.cpu()
                settle_now = [
                    sequence.settle(token_level[own], places[own], step, n_passes=n_passes, threshold=threshold)
                    for own, sequence in zip(owners == torch.arange(len(sequences))[:, None], sequences, strict=True)
                ]
                rows = open_rows[torch.cat(settle_now).to(open_rows.device)]
                logits = self.model.decode(state.hidden, batch.packing, rows).float()
                guesses[rows] = logits.argmax(-1)
                nats[rows] = F.cross_entropy(logits, batch.targets[rows], reduction="none").double()
                state = self.model.settle(state, rows, guesses[rows])
            parts.append(batch.measured(guesses[batch.rows], nats[batch.rows]))
            efforts.append(torch.tensor([[1, len(s.levels), s.decodes, s.n_masked, s.shortlisted] for s in sequences]))
        return Outcome(joined(parts), Effort(*torch.cat(efforts).unbind(1)))

    def _order(self, segment: Tensor, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(stable_seed(self.seed, index))
        return masking.mask_ranks(masking.maskable_rows(segment, self.tokenizer.special_ids), generator)


class _Settling:
    """The state of one sequence in a batch that settles, with the reference's arithmetic."""

    def __init__(self, n_masked: int) -> None:
        self.n_masked, self.n_settled = n_masked, 0
        self.decodes = self.shortlisted = 0
        self.levels: list[float] = []
        self.halted = False

    def settle(self, token_level: Tensor, rows: Tensor, step: int, *, n_passes: int, threshold: float) -> Tensor:
        """Which of its open rows `(K,)` are written after this pass, with these token levels `(K,)`: `(K,)` bool."""
        if self.halted:
            return torch.zeros(0, dtype=torch.bool)  # nothing is open any more
        if step < n_passes:  # after the last pass all that is open settles, whatever its level
            self.shortlisted += len(token_level)
        settles = which_settle(token_level, rows, due(self.n_masked, step, n_passes) - self.n_settled, threshold)
        level = settled_level(token_level[~settles], self.n_masked, self.levels)
        self.levels.append(level)
        self.halted = None is not halt_reason(
            level=level,
            threshold=threshold,
            step=step,
            max_steps=n_passes,
            all_settled=self.n_settled + int(settles.sum()) == self.n_masked,
            out_of_time=False,
        )
        if self.halted:
            settles = torch.ones_like(settles)
        self.n_settled += int(settles.sum())
        self.decodes += bool(settles.any())
        return settles


def joined(parts: list[Part]) -> Part:
    """The scores or efforts of slices as those of all segments."""
    return type(parts[0])(*(torch.cat(values, -1) for values in zip(*parts, strict=True)))


def at_depth(scores: Measured, steps: Tensor) -> Outcome:
    """The outcome of segments that stop after `steps` `(S,)` passes, from the scores of every depth `(P, M)`."""
    depth = (steps[scores.segments] - 1)[None]
    correct, nats, guesses = (values.gather(0, depth)[0] for values in (scores.correct, scores.nats, scores.guesses))
    once = torch.ones_like(steps)
    masks = torch.bincount(scores.segments, minlength=len(steps))
    effort = Effort(once, steps, once, masks, shortlisted=torch.zeros_like(steps))
    return Outcome(Measured(correct, nats, scores.segments, guesses), effort)
