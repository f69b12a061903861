"""`python -m benchmarks.training`: tokens a second of a training step, and its share of the matrix peak.

Real steps of the real trainer on random words, in float32 and where it is native in bfloat16: pretraining with one
pass, and the random unroll. Only what the model must multiply counts as useful: a pass forward once, a pass that
carries a gradient three times, the vocabulary for masked rows alone. The gate's deep runs take time but do not count.
The peak is the feed-forward product over a whole batch, in the same number format, measured in the same run.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import BUNDLED, record
from benchmarks.files import names_files
from benchmarks.options import count
from benchmarks.timing import matrix_peak, seconds
from rdt_core import checkpoint, flops
from training.config import TrainConfig
from training.config_file import load_config
from training.data import Batch
from training.learner import Learner
from training.losses import Losses
from training.mixed_precision import has_bfloat16
from training.options import device_named
from training.trainer import Trainer

N_WORDS, WARM_STEPS = 100_000, 2
PHASES = {"one pass": 10**6, "unroll": 0}  # steps of pretraining


class Counting(Learner):
    """A learner that adds up the useful FLOPs of its steps."""

    useful_flops = 0
    n_tokens = 0

    def _draw_passes(self) -> int:
        self.drawn = super()._draw_passes()
        return self.drawn

    def _losses(self, batch: Batch) -> Losses:
        losses = super()._losses(batch)
        config, length, n_tokens = self.model.config, batch.length, len(batch.targets)
        with_gradient = min(self.drawn, self.config.training.grad_passes)
        outer = (config.n_prelude_layers + config.n_coda_layers * with_gradient) * flops.layer_flops(config, length)
        passes = (self.drawn + 2 * with_gradient) * flops.pass_flops(config, length)
        n_masked = int(batch.masked.sum())
        decoded = 3 * with_gradient * n_masked * flops.decode_flops(config)
        unread = 3 * (n_tokens - n_masked) * flops.unread_flops(config)
        self.useful_flops += n_tokens * (3 * outer + passes) + decoded - unread
        self.n_tokens += n_tokens
        return losses


def measure(config: TrainConfig, device: torch.device, n_steps: int) -> dict[str, Any]:
    """Median tokens a second over single steps, and their useful FLOP/s over the peak's."""
    trainer = Trainer(config, device)
    trainer.learner = counting = Counting(trainer.model, config, trainer.stages, trainer.processes)
    steps = trainer._steps()
    for _ in range(WARM_STEPS):
        next(steps)
    rates, work = [], []
    for _ in range(n_steps):
        counting.useful_flops = counting.n_tokens = 0
        took = seconds(lambda: next(steps), device)
        rates.append(counting.n_tokens / took)
        work.append(counting.useful_flops / took)
    shape, dtype = trainer.model.config, torch.bfloat16 if config.mixed_precision else torch.float32
    peak = matrix_peak(trainer.batches.tokens_a_batch, shape.d_model, shape.d_ff, dtype, device)
    return {
        "bfloat16": config.mixed_precision,
        "compiled": config.training.compile,
        "tokens_per_second": round(statistics.median(rates)),
        "useful_gflops": round(statistics.median(work) / 1e9, 1),
        "peak_gflops": round(peak / 1e9, 1),
        "share_of_peak": round(statistics.median(work) / peak, 3),
    }


def write_words(path: Path, tokenizer_of: Path) -> None:
    """Random words of the vocabulary, so that no corpus is needed."""
    tokenizer = checkpoint.tokenizer_of(tokenizer_of, checkpoint.read(tokenizer_of))
    words = [word for word in tokenizer.pieces if word.isascii() and word.isalpha()]
    drawn = random.Random(0).choices(words, k=N_WORDS)
    path.write_text("\n".join(" ".join(drawn[i : i + 50]) for i in range(0, N_WORDS, 50)), encoding="utf-8")


@names_files
def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("training/configs/rdt-small.yaml"))
    parser.add_argument("--tokenizer", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=count, help="of the CPU (default: all cores)")
    parser.add_argument("--compile", action="store_true", help="measure with the layers compiled, too")
    parser.add_argument("--steps", type=count, default=10, help="measured in each phase (default: %(default)s)")
    parser.add_argument("assignments", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    device = device_named(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "words.txt"
        write_words(text, options.tokenizer)
        given = [f"data.dataset_name={text}", f"data.tokenizer_name={options.tokenizer}"]
        given += [f"{name}={folder}" for name in ("data.cache_dir", "output.checkpoint_dir", "output.log_dir")]
        for phase, one_pass_steps in PHASES.items():
            for mixed in (False, True) if has_bfloat16(device) else (False,):
                settings = [*given, *options.assignments, f"training.one_pass_steps={one_pass_steps}"]
                config = replace(load_config(options.config, None, settings), mixed_precision=mixed)
                for compiled in (False, True) if options.compile else (False,):
                    config = replace(config, training=replace(config.training, compile=compiled))
                    found = measure(config, device, options.steps)
                    results.append({"phase": phase, **found})
                    print(results[-1], flush=True)
    record.finish("training", options, results=results)


if __name__ == "__main__":
    main()
