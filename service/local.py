"""Restores texts in this process with the reference loop: what `rdt-denoise` runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from service.denoiser import build_job
from service.engine.reference import run_reference
from service.limits import Limits
from service.loading import load_model
from service.schema import read_request
from service.text import encode, write_back

MAX_STEPS = 1000
"""Only a guard against typing errors: no other request waits behind this one."""


@dataclass(frozen=True)
class LocalAnswer:
    text: str
    steps: int
    max_steps: int


class LocalDenoiser:
    """Raises what `load_model` raises."""

    def __init__(self, checkpoint: Path, device_name: str) -> None:
        self._loaded = load_model(checkpoint, device_name)
        self._limits = Limits(self._loaded.model.config.max_seq_len, MAX_STEPS, max_top_k=0, max_batch_items=1)

    def denoise(
        self, text: str, max_steps: int | None = None, threshold: float | None = None, halting: str | None = None
    ) -> LocalAnswer:
        """None asks for the checkpoint's own. Raises `InvalidArgument` and `TooLarge`."""
        fields = {"text": text, "max_steps": max_steps, "threshold": threshold, "halting": halting}
        request = read_request(fields, self._limits)
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        encoding = encode(request.text, tokenizer, self._limits)
        job = build_job(request, encoding, model.config, self._limits)
        result = run_reference(model, job)
        return LocalAnswer(write_back(encoding, result, tokenizer).text, result.steps, job.max_steps)
