"""`python -m training.evaluate --checkpoint F --text F`: how well a model restores text, and at what cost.

The text is cut into segments of one length; each has one random order of masking, so the masks of the
mask ratios are nested and the same for every model and every method. For every mask ratio, rows of:

- fixed: every sequence takes the same number of passes;
- gate: every sequence stops when its level falls below a threshold;
- table: a depth for each mask ratio, chosen on `--validation` text for a budget of mean passes;
- unchanged: a sequence stops when at most this share of its best guesses changed in the last pass;
- settle: masked tokens are written back at the pace of `rdt_core.halting.due` over a number of passes;
- settle-gate: the same, and tokens whose own level is below a threshold are written at once;
- mask-predict, ancestral, ancestral-greedy: decoders that run the model anew in every round, with
  `--round-depth` passes each.

Fixed depths, gates, tables and unchanged are read off the same passes, so they are compared on equal terms. Exact
match is over masked tokens. A run is a maximal stretch of adjacent masked word pieces; it is right if all of it is.
BLEU is of whole segments, as word pieces. Intervals are 95 % over segments. Bits are those of the true token at the
moment its place is written; methods that write in several rounds are then conditioned on their own guesses. Bits
under a left-to-right model (`--scorer`) are of the restored text. Low ones can also mean dull text: compare them with
the original's. Passes are per sequence. FLOPs are per token of text, count the model's matrices but for the
gate's, and count each round as a whole forward.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from rdt_core import checkpoint
from rdt_core.checkpoint import CheckpointError, LoadedModel
from rdt_core.precision import PRECISIONS, prepare
from training.config import ConfigError
from training.corpus import TEXTS, local_corpus, named_files, shared_files, shown_files
from training.evaluation import tallies
from training.evaluation.causal import Scorer, load_scorer
from training.evaluation.restoring import Evaluation, cut_segments
from training.evaluation.table import Evaluated, Plan, evaluate
from training.files import make_folder, write_whole
from training.memory import enough_memory
from training.optimise import average_note
from training.options import check_batch_size, check_numbers, device_named, path_named
from training.report import format_comparisons, format_levels, format_table, plot_lines, print_text
from training.stopping import command

PLAN = Plan()
LENGTH = 128


@command
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        plan = _plan(options)
        if options.output is not None:
            make_folder(options.output, "--output")
        loaded = _load(options)
        if note := average_note(loaded.checkpoint):
            print(f"rdt-evaluate: {options.checkpoint}{note}", file=sys.stderr)
        scorer = None if options.scorer is None else _scorer(options, loaded)
        if shared := _learned_from(loaded) & {path.name for path in named_files(options.text)}:
            print(f"rdt-evaluate: the model has learned from {', '.join(sorted(shared))}", file=sys.stderr)
        evaluation = _evaluation(options, loaded, options.text, "--text")
        validation = None
        if options.validation is not None:
            validation = _evaluation(options, loaded, options.validation, "--validation")
        with enough_memory("--batch-size", options.batch_size, "--length"):
            found = evaluate(evaluation, plan, validation, scorer)
        status = print_text(as_text(found))
        _keep(options, loaded, evaluation, found, plan=plan, scorer=scorer)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"rdt-evaluate: {error}", file=sys.stderr)
        return 2
    return status


def _keep(
    options: argparse.Namespace, loaded: LoadedModel, evaluation: Evaluation, found: Evaluated, *, plan: Plan,
    scorer: Scorer | None
) -> None:  # fmt: skip
    """The files of `--output`, if that is given. Raises `OSError`."""
    if options.output is not None:
        summary = {"model": loaded.name, "digest": loaded.digest, **describe(evaluation, options, scorer)}
        summary |= {"plan": asdict(plan), **asdict(replace(found, tallies=[]))}
        del summary["tallies"]
        table, text = json.dumps(summary, indent=1) + "\n", as_text(found) + "\n"
        write_whole(
            {  # in this order: there is never a table without its tallies
                options.output / "evaluation.npz": lambda path: tallies.write(path, found.rows, found.tallies),
                options.output / "evaluation.json": lambda path: path.write_text(table, encoding="utf-8"),
                options.output / "evaluation.txt": lambda path: path.write_text(text, encoding="utf-8"),
            }
        )
        lines = [(row.kind, row) for row in found.rows]
        write_whole({options.output / "evaluation.png": lambda path: plot_lines(lines, path)})


def as_text(found: Evaluated) -> str:
    """The table, what was looked up, the gate against the lookups, and what the level is worth."""
    parts = [format_table(found.rows)]
    if found.original_lm_bits:
        bits = ", ".join(f"{value:.2f} at {ratio:g}" for ratio, value in found.original_lm_bits.items())
        parts.append(f"the original's bits under the left-to-right model, at the masks: {bits}")
    if found.tables:
        lines = ["depths chosen on validation text, by mask ratio"]
        for budget, table in found.tables.items():
            lines.append(f"table {budget:g}: " + ", ".join(f"{depth} at {ratio:g}" for ratio, depth in table.items()))
        parts.append("\n".join(lines))
    if found.comparisons:
        parts.append(format_comparisons(found.comparisons))
    if found.levels:
        parts.append(format_levels(found.levels))
    return "\n\n".join(parts)


def describe(evaluation: Evaluation, options: argparse.Namespace, scorer: Scorer | None) -> dict[str, Any]:
    """What was evaluated. Two evaluations with the same `masks` restored the same tokens."""
    n_segments, length = evaluation.targets.shape
    masks = hashlib.sha256(evaluation.targets.cpu().numpy().tobytes() + evaluation.ranks.cpu().numpy().tobytes())
    return {
        "segments": n_segments,
        "length": length,
        "precision": options.precision,
        "seed": options.seed,
        "masks": masks.hexdigest()[:16],
        "text": shown_files(options.text),
        "validation": None if options.validation is None else shown_files(options.validation),
        "scorer": None if scorer is None else {"name": scorer.name, "digest": scorer.digest, "text": scorer.text},
    }


def _load(options: argparse.Namespace) -> LoadedModel:
    """The model, in the number format asked for. Raises `CheckpointError` and `ConfigError`."""
    device = device_named(options.device)
    loaded = checkpoint.load(options.checkpoint, device)
    try:
        prepare(loaded.model, options.precision)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    most = loaded.model.config.max_seq_len
    if options.length is None:
        options.length = min(LENGTH, most)
    if options.length > most:
        raise ConfigError(f"--length is {options.length}: the model takes at most {most} tokens")
    return loaded


def _evaluation(options: argparse.Namespace, loaded: LoadedModel, text: str, named: str) -> Evaluation:
    corpus = local_corpus(text, loaded.tokenizer, options.cache_dir, named)
    tokens = torch.from_numpy(corpus.tokens.astype("int64"))
    segments = cut_segments(tokens, loaded.tokenizer, options.length, options.segments, named=named)
    if len(segments) < 2:
        raise ConfigError(
            f"{named} has one segment of {options.length} tokens: want 2, intervals are of their differences"
        )
    evaluation = Evaluation(loaded.model, loaded.tokenizer, segments, options.seed, options.batch_size)
    for ratio in options.mask_ratios:
        if not evaluation.masked(ratio).any():
            raise ConfigError(f"{named} has no word to mask at --mask-ratios {ratio}: they are too few, or all unknown")
    return evaluation


def _scorer(options: argparse.Namespace, loaded: LoadedModel) -> Scorer:
    """The scorer, which must have the model's word pieces. Prints a note if both learned from the same file."""
    path = options.scorer
    scorer = load_scorer(path, loaded.model.device, bfloat16=options.precision == "bf16")
    if scorer.tokenizer.pieces != loaded.tokenizer.pieces:
        raise ConfigError(f"--scorer {path}: it has other word pieces than the model")
    if shared := _learned_from(loaded) & set(scorer.text.split(",")):
        print(f"rdt-evaluate: the scorer and the model both learned from {', '.join(sorted(shared))}", file=sys.stderr)
    return scorer


def _learned_from(loaded: LoadedModel) -> set[str]:
    """Names of the files that the model has learned from, as far as the checkpoint says."""
    try:
        names = str(loaded.checkpoint.config["training"]["data"]["dataset_name"])
    except (KeyError, TypeError):
        return set()
    return {path.name for path in named_files(names)} - {""}


def _plan(options: argparse.Namespace) -> Plan:
    """The plan that the options ask for. Raises `ConfigError`."""
    lowest: dict[str, float] = {"max_depth": 1, "thresholds": 0, "unchanged": 0, "budgets": 1, "settle_passes": 1,
                                "settle_thresholds": 0, "mask_predict": 1, "ancestral": 1,
                                "round_depth": 1, "length": 3, "segments": 2, "seed": 0, "batch_size": 1}  # fmt: skip
    check_numbers(options, lowest, {"max_depth", "settle_passes", "mask_predict", "ancestral", "round_depth"})
    check_batch_size(options.batch_size, options.length or LENGTH)
    if options.validation is not None and shared_files(options.validation, options.text):
        raise ConfigError("--validation is --text: what is chosen must be chosen on other text")
    for ratio in options.mask_ratios:
        if not 0 < ratio <= 1:
            raise ConfigError(f"--mask-ratios has {ratio}: want above 0, up to 1")
    return Plan(**{name: getattr(options, name) for name in asdict(PLAN)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rdt-evaluate",
        description="Evaluate a checkpoint on masked text. A list given without values leaves that method out.",
    )
    parser.add_argument("--checkpoint", required=True, type=path_named)
    parser.add_argument("--text", required=True, help=TEXTS)
    parser.add_argument("--validation", help="other such files, to choose the table's depths and the best lookup on")
    parser.add_argument("--scorer", type=path_named, help="a file of python -m training.scorer")
    parser.add_argument("--output", type=path_named, help="folder for evaluation.json, .npz, .txt and .png")
    parser.add_argument("--length", type=int, help=f"tokens a segment (default: {LENGTH}, or what the model takes)")
    parser.add_argument("--segments", type=int, help="how many segments of each text, evenly spread (default: all)")
    parser.add_argument("--mask-ratios", type=float, nargs="+", default=PLAN.mask_ratios)
    parser.add_argument("--max-depth", type=int, default=PLAN.max_depth)
    parser.add_argument("--thresholds", type=float, nargs="*", default=PLAN.thresholds)
    parser.add_argument("--unchanged", type=float, nargs="*", default=PLAN.unchanged, help="shares of changed guesses")
    parser.add_argument("--budgets", type=float, nargs="*", default=PLAN.budgets, help="mean passes of the tables")
    parser.add_argument("--settle-passes", type=int, nargs="*", default=PLAN.settle_passes)
    parser.add_argument("--settle-thresholds", type=float, nargs="*", default=PLAN.settle_thresholds)
    parser.add_argument("--mask-predict", type=int, nargs="*", default=PLAN.mask_predict, help="numbers of rounds")
    parser.add_argument("--ancestral", type=int, nargs="*", default=PLAN.ancestral, help="numbers of steps")
    parser.add_argument("--round-depth", type=int, default=PLAN.round_depth, help="passes of each such round or step")
    parser.add_argument("--seed", type=int, default=0, help="of masks, samples and resamples (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="segments at once (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the model, and bf16 of the scorer, too (default: %(default)s)",
    )
    parser.add_argument("--cache-dir", type=path_named, default="runs/cache")
    return parser


if __name__ == "__main__":
    sys.exit(main())
