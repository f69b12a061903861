"""What every peer runs: ordinary dynamic batching at its best.

A batch is padded to its longest sequence and run until its slowest has halted. In favour of the peers, only masked rows
are decoded, and computed in the last layer of a pass that must be the last. Nor is padding masked out of the attention:
that makes the answers wrong, and the passes cheaper than correct ones could be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rdt_core import RDT, Packing, checkpoint
from rdt_core.precision import prepare
from rdt_core.tokenizer import Encoding

PAD_ID = 0


class Job(Protocol):
    """One sequence to restore, halted by the gate."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def masked(self) -> Sequence[bool]: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def threshold(self) -> float: ...


@dataclass(frozen=True)
class Restored:
    """`choices` are the tokens of the masked rows after the batch's last pass; `steps` are the job's own passes."""

    choices: list[int]
    steps: int


@torch.inference_mode()
def restore(model: RDT, batch: Sequence[Job]) -> list[Restored]:
    """One padded batch, from the first pass of all to the last of the slowest."""
    longest = max(len(job.tokens) for job in batch)
    tokens = torch.full((len(batch), longest), PAD_ID)
    masked = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, job in enumerate(batch):
        tokens[row, : len(job.tokens)] = torch.tensor(job.tokens)
        masked[row, : len(job.masked)] = torch.tensor(job.masked)
    tokens, masked = tokens.to(model.device), masked.to(model.device)
    packing = Packing.of([longest] * len(batch), model.device)
    state = model.begin(tokens.flatten(), masked.flatten(), packing)
    rows = masked.flatten().nonzero().squeeze(1)
    deepest = max(job.max_steps for job in batch)
    steps = [0] * len(batch)  # 0: not halted
    step = 0
    while 0 in steps:
        state = model(state, packing, rows if step + 1 == deepest else None)
        step += 1
        for row, (job, level) in enumerate(zip(batch, state.gate.level.tolist(), strict=True)):
            if steps[row] == 0 and (level < job.threshold or step >= job.max_steps):
                steps[row] = step
    best = model.decode(state.hidden, packing, rows).argmax(-1)
    choices = best.split(masked.sum(1).tolist())
    return [Restored(chosen.tolist(), own) for chosen, own in zip(choices, steps, strict=True)]


@dataclass(frozen=True)
class _Text:
    encoding: Encoding
    max_steps: int
    threshold: float

    @property
    def tokens(self) -> list[int]:
        return self.encoding.ids

    @property
    def masked(self) -> list[bool]:
        return self.encoding.masked


class Model:
    """A checkpoint, as one worker of a peer holds it."""

    def __init__(self, path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        loaded = checkpoint.load(path)
        self._model, self._tokenizer = prepare(loaded.model), loaded.tokenizer

    def answer(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Bodies of `POST /denoise` (text, max_steps, threshold; halting is `gate`) -> text and steps of each."""
        batch = [self._read(body) for body in bodies]
        return [
            {"text": self._write(text.encoding, restored.choices), "steps": restored.steps}
            for text, restored in zip(batch, restore(self._model, batch), strict=True)
        ]

    def answer_any(self, asked: Any) -> Any:
        """A list of bodies -> a list of answers; a body -> its answer: some servers do not wrap a batch of one."""
        return self.answer(asked) if isinstance(asked, list) else self.answer([asked])[0]

    def _read(self, body: Mapping[str, Any]) -> _Text:
        config = self._model.config
        if body.get("halting", config.halting) != "gate":
            raise ValueError("halting: want gate")
        encoding = self._tokenizer.encode(body["text"])
        return _Text(encoding, body.get("max_steps", config.max_steps), body.get("threshold", config.threshold))

    def _write(self, encoding: Encoding, choices: Sequence[int]) -> str:
        rows = [row for row, masked in enumerate(encoding.masked) if masked]
        return self._tokenizer.write(encoding, dict(zip(rows, choices, strict=True)))
