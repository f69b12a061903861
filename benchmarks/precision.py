"""`python -m benchmarks.precision`: what bf16 and int8 cost in exact match, at every depth, against fp32.

The same segments with the same masks go through the same weights in each format. Differences are paired:
percentage points of masked tokens restored exactly, with a 95 % interval over segments. `same_steps` is
the share of segments that the gate halts after the same pass at `--threshold`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import BUNDLED, record
from benchmarks.files import names_files
from benchmarks.options import amount, count, share
from rdt_core import LoadedModel, checkpoint
from rdt_core.precision import PRECISIONS, prepare
from training.corpus import local_corpus
from training.evaluation.lookups import halting_depths
from training.evaluation.measures import paired_difference, per_segment
from training.evaluation.restoring import Evaluation, Measured, cut_segments

ALLOWED_POINTS = 0.5

Measurement = list[tuple[Measured, Tensor]]  # of each mask ratio: scores, levels


def measure(loaded: LoadedModel, segments: list[Tensor], precision: str, options: argparse.Namespace) -> Measurement:
    prepare(loaded.model, precision)  # type: ignore[arg-type]
    evaluation = Evaluation(loaded.model, loaded.tokenizer, segments, seed=0)
    return [evaluation.depths(ratio, options.max_depth) for ratio in options.mask_ratios]


def compare(ratio: float, fp32: tuple[Measured, Tensor], other: tuple[Measured, Tensor], threshold: float) -> Any:
    (wanted, levels), (got, other_levels) = fp32, other
    n_segments = levels.shape[1]
    masks = torch.bincount(wanted.segments, minlength=n_segments)
    before, now = (per_segment(scores.correct, scores.segments, n_segments) for scores in (wanted, got))  # (P, S) each
    gains = [paired_difference(ours, theirs, masks) for ours, theirs in zip(now, before, strict=True)]
    same = halting_depths(levels, threshold) == halting_depths(other_levels, threshold)
    return {
        "mask_ratio": ratio,
        "exact_match_fp32": [round(100 * depth.mean().item(), 2) for depth in wanted.correct],
        "points_over_fp32": [round(100 * gain.value, 3) for gain in gains],
        "interval": [round(100 * gain.interval, 3) for gain in gains],
        "worst": round(100 * min(gain.value for gain in gains), 3),
        "same_steps": round(same.double().mean().item(), 4),
    }


@names_files
def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--text", required=True, help="local .txt or .txt.xz file")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16", "int8"])
    parser.add_argument("--segments", type=count, default=200, help="how many, evenly spread")
    parser.add_argument("--length", type=count, default=128, help="tokens a segment")
    parser.add_argument("--mask-ratios", type=share, nargs="+", default=[0.15, 0.5])
    parser.add_argument("--max-depth", type=count, default=16)
    parser.add_argument("--threshold", type=amount, default=0.1, help="of the gate (default: %(default)s)")
    parser.add_argument("--cache-dir", default="runs/cache")
    options = parser.parse_args()
    loaded = checkpoint.load(options.model)
    corpus = local_corpus(options.text, loaded.tokenizer, options.cache_dir, "--text")
    tokens = torch.from_numpy(corpus.tokens.astype("int64"))
    segments = cut_segments(tokens, loaded.tokenizer, options.length, options.segments)
    fp32 = measure(loaded, segments, "fp32", options)
    results: dict[str, Any] = {}
    for precision in options.precisions:
        other = measure(checkpoint.load(options.model), segments, precision, options)
        results[precision] = [
            compare(ratio, a, b, options.threshold)
            for ratio, a, b in zip(options.mask_ratios, fp32, other, strict=True)
        ]
        worst = min(row["worst"] for row in results[precision])
        verdict = "within" if worst >= -ALLOWED_POINTS else "NOT within"
        print(f"{precision}: worst {worst:+.2f} points of exact match over depths 1-{options.max_depth}, "
              f"{verdict} {ALLOWED_POINTS}", flush=True)  # fmt: skip
    options.text = Path(options.text)
    record.finish("precision", options, model=loaded.name, results=results)


if __name__ == "__main__":
    main()
