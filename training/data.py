"""From a text's tokens to batches, drawn without state.

Batch `k` is a pure function of the seed and `k`, so a run that resumes at step `k` sees exactly what
an uninterrupted one would have seen, and no position in the data has to be saved. A batch holds random
segments of one length, `[CLS] ... [SEP]`, and no padding.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rdt_core import masking
from rdt_core.packing import Packing
from rdt_core.tokenizer import Tokenizer
from training.config import TrainConfig, TrainingSection
from training.corpus import Corpus


class Batch(NamedTuple):
    """`N` segments of one length, packed: T = N x L."""

    targets: Tensor  # (T,) the text
    tokens: Tensor  # (T,) what the model sees
    masked: Tensor  # (T,) bool, what it must restore
    due_passes: Tensor  # (T,) the pass at which the chain reveals a row, 1 first; 0 where visible
    start_steps: Tensor  # (N,) the step of the masking chain each segment shows
    length: int

    def packing(self, device: torch.device) -> Packing:
        return Packing.of([self.length] * (len(self.targets) // self.length), device)

    def first(self, n: int) -> Batch:
        """Its first `n` segments."""
        end = n * self.length
        return Batch(
            targets=self.targets[:end],
            tokens=self.tokens[:end],
            masked=self.masked[:end],
            due_passes=self.due_passes[:end],
            start_steps=self.start_steps[:n],
            length=self.length,
        )

    def to(self, device: torch.device) -> Batch:
        moved = (x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self)
        return Batch(*moved)  # type: ignore[arg-type]


class Vocabulary(NamedTuple):
    """What batches need of a tokenizer, as plain values that can be sent to worker processes."""

    size: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        return cls(tokenizer.vocab_size, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.special_ids)


START_FAVOUR = 4
"""How many times as often as other text the start of a paragraph may be drawn."""


class Batches(Dataset[Batch]):
    """Random segments of a corpus; item `k` depends on the seed and `k` alone."""

    def __init__(self, corpus: Corpus, config: TrainConfig, tokenizer: Tokenizer, seed: int) -> None:
        self.corpus, self.config, self.seed = corpus, config, seed
        self.vocabulary = Vocabulary.of(tokenizer)
        self.tokens_a_batch = config.training.batch_size * config.data.max_seq_length

    def __len__(self) -> int:
        """Batches that hold as many tokens as the corpus: one epoch."""
        return max(1, len(self.corpus) // self.tokens_a_batch)

    def __getitem__(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(stable_seed(self.seed, index))
        length = self._draw_length(generator)
        segments = [self._draw_segment(length, generator) for _ in range(self.tokens_a_batch // length)]
        return make_batch(segments, self.config.training, self.vocabulary, generator)

    def _draw_length(self, generator: torch.Generator) -> int:
        section = self.config.data
        full, where = torch.rand(2, generator=generator).tolist()
        if full < section.full_length_share:
            return section.max_seq_length
        low, high = math.log(section.min_seq_length), math.log(section.max_seq_length + 1)
        return min(section.max_seq_length, int(math.exp(low + where * (high - low))))

    def _draw_segment(self, length: int, generator: torch.Generator) -> Tensor:
        """A share of them starts where a paragraph does, as callers' texts do. Where paragraphs are long, fewer do, so
        that other text is seen often enough.
        """
        last = len(self.corpus) - (length - 2)
        start = int(torch.randint(last + 1, (), generator=generator))
        near_starts = len(self.corpus.starts) * length / len(self.corpus)
        if torch.rand((), generator=generator) < min(self.config.data.start_share, START_FAVOUR * near_starts):
            before = int(np.searchsorted(self.corpus.starts, start, side="right"))
            start = int(self.corpus.starts[before - 1]) if before else start  # the tail of a split may have none
        body = torch.from_numpy(self.corpus.tokens[start : start + length - 2].astype(np.int64))
        return torch.cat((torch.tensor([self.vocabulary.cls_id]), body, torch.tensor([self.vocabulary.sep_id])))


def make_batch(
    segments: list[Tensor], section: TrainingSection, vocabulary: Vocabulary, generator: torch.Generator
) -> Batch:
    """Mask each segment at a random step of its own chain."""
    targets, due_passes, steps = torch.cat(segments), [], []
    for segment in segments:
        seed = int(torch.randint(2**31, (), generator=generator))
        curve = masking.schedule(section.masking_strategy, seed)
        step = int(torch.randint(1, section.total_steps + 1, (), generator=generator))
        ranks = masking.mask_ranks(masking.maskable_rows(segment, vocabulary.special_ids), generator)
        chain_of_masks = masking.chain_masks(ranks, section.total_steps, curve)  # (total_steps + 1, L)
        due_passes.append(chain_of_masks[: step + 1].sum(0))
        steps.append(step)
    due = torch.cat(due_passes)
    masked = due > 0
    tokens = masking.corrupt(
        targets,
        masked,
        vocabulary.mask_id,
        vocab_size=vocabulary.size,
        random_share=section.random_token_share,
        keep_share=section.keep_token_share,
        generator=generator,
    )
    return Batch(targets, tokens, masked, due, torch.tensor(steps), len(segments[0]))


def stable_seed(*parts: int) -> int:
    """A 63-bit seed from whole numbers, the same on every machine."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
