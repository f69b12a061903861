from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from rdt_core import RDT, Tokenizer, flops
from training.evaluate import main
from training.evaluation import table, tallies
from training.evaluation.restoring import Evaluation, cut_segments
from training.evaluation.table import Deep, Judge, Plan, choose_tables, evaluate
from training.report import format_comparisons, format_table, print_text

SMALL = Plan(
    mask_ratios=(0.3,),
    max_depth=3,
    thresholds=(0.1,),
    unchanged=(0.0,),
    budgets=(2,),
    settle_passes=(2,),
    settle_thresholds=(0.2,),
    mask_predict=(2,),
    ancestral=(2,),
)

N_CARDS = torch.cuda.device_count()


def evaluation_of(model: RDT, tokenizer: Tokenizer, seed: int, length: int = 12) -> Evaluation:
    stream = torch.randint(5, tokenizer.vocab_size, (60,), generator=torch.Generator().manual_seed(seed))
    return Evaluation(model, tokenizer, cut_segments(stream, tokenizer, length, at_most=None), seed=0, batch_size=4)


@pytest.fixture
def evaluation(tiny_model: RDT, tiny_tokenizer: Tokenizer) -> Evaluation:
    return evaluation_of(tiny_model, tiny_tokenizer, seed=0)


@pytest.fixture
def validation(tiny_model: RDT, tiny_tokenizer: Tokenizer) -> Evaluation:
    return evaluation_of(tiny_model, tiny_tokenizer, seed=1)


def test_by_default_settling_has_the_paces_that_the_card_speaks_of() -> None:
    plan = Plan()
    assert {2, 3, 4, plan.max_depth} <= set(plan.settle_passes), "the last as a rival of settle-gate at equal passes"


def test_a_threshold_above_every_level_is_a_depth_of_one(evaluation: Evaluation) -> None:
    plan = replace(SMALL, max_depth=4, thresholds=(2.0, 0.0), settle_passes=(1, 4), settle_thresholds=(2.0, 0.0))
    rows = {(row.kind, row.setting): row for row in evaluate(evaluation, plan).rows}
    n_masked = evaluation.masked(rows["fixed", 1].mask_ratio).sum().item()
    levels_asked = n_masked * flops.shortlist_flops(evaluation.model.config) / evaluation.targets.numel()
    for kind, setting, depth in (("gate", 2.0, 1), ("gate", 0.0, 4), ("settle", 1, 1), ("settle-gate", 2.0, 1)):
        row, fixed = rows[kind, setting], rows["fixed", depth]
        assert row.exact_match == fixed.exact_match
        assert row.bits == pytest.approx(fixed.bits)
        assert row.bleu == fixed.bleu
        assert row.passes == depth
        assert row.flops_per_token == pytest.approx(fixed.flops_per_token + levels_asked * (kind == "settle-gate"))
    assert replace(rows["settle", 4], kind="settle-gate", setting=0.0) == rows["settle-gate", 0.0], "as deep as any"
    assert rows["settle", 4].passes > 2


def test_every_method_has_a_row_and_no_row_lacks_a_measure(evaluation: Evaluation, validation: Evaluation) -> None:
    found = evaluate(evaluation, SMALL, validation)
    assert [row.label for row in found.rows] == [
        *("fixed 1", "fixed 2", "fixed 3", "gate 0.1", "table 2", "unchanged 0", "settle 2", "settle-gate 0.2"),
        *("mask-predict 2", "ancestral 2", "ancestral-greedy 2"),
    ]
    assert all(None not in (row.run_2, row.bleu) and row.lm_bits is None for row in found.rows)
    assert [(one.kind, one.against, one.best) for one in found.comparisons if one.kind == "settle-gate"] == [
        ("settle-gate", "settle", True)
    ]
    assert sum(one.best for one in found.comparisons if one.kind == "gate") == 1


@pytest.mark.parametrize("with_tables", [True, False])
def test_the_bar_counts_the_rows(
    evaluation: Evaluation, validation: Evaluation, with_tables: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[tqdm[Any]] = []

    def kept(*args: Any, **options: Any) -> tqdm[Any]:
        bars.append(tqdm(*args, **options | {"disable": False, "file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr(table, "tqdm", kept)
    plan = replace(SMALL, mask_ratios=(0.3, 0.5), max_depth=4, thresholds=(0.1, 0.2, 0.3), ancestral=(2, 3))
    found = evaluate(evaluation, plan, validation if with_tables else None)
    assert bars[-1].total == bars[-1].n == len(found.rows)


def test_the_table_is_chosen_on_validation_text_alone(
    evaluation: Evaluation, validation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depths that are best where they are evaluated, and bad on validation text, are not taken."""
    depths = Evaluation.depths

    def rigged(self: Evaluation, ratio: float, max_depth: int) -> object:
        scores, levels = depths(self, ratio, max_depth)
        best = 2 if self is validation else 3
        right = torch.zeros_like(scores.correct)
        right[best - 1] = 1
        return scores._replace(correct=right), levels

    monkeypatch.setattr(Evaluation, "depths", rigged)
    plan = replace(SMALL, mask_ratios=(0.3, 0.6), budgets=(3,), thresholds=(0.0,))
    tables = choose_tables({ratio: Deep(validation, ratio, plan) for ratio in plan.mask_ratios}, plan)
    assert tables == {3: {0.3: 2, 0.6: 2}}
    found = evaluate(evaluation, plan, validation)
    assert found.tables == tables
    assert {row.depth for row in found.rows if row.kind == "table"} == {2}
    assert {one.against for one in found.comparisons if one.kind == "gate" and one.best} == {"table"}


def test_the_best_lookup_is_chosen_on_validation_text(
    evaluation: Evaluation, validation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all is right there and nothing here."""
    depths, compared = Evaluation.depths, {}

    def rigged(self: Evaluation, ratio: float, max_depth: int) -> object:
        scores, levels = depths(self, ratio, max_depth)
        return scores._replace(correct=torch.full_like(scores.correct, float(self is validation))), levels

    def note(kind: str, _settings: object, *here: Any, held: Any = None, **_: object) -> list[Any]:
        compared[kind] = here, held
        return []

    monkeypatch.setattr(Evaluation, "depths", rigged)
    monkeypatch.setattr(table, "against_lookups", note)
    evaluate(evaluation, SMALL, validation)
    (rules, lookups), held = compared["gate"]
    assert held.lookups.keys() == lookups.keys() == {"fixed", "table", "unchanged"}
    assert all(one.hits.all() for one in (held.rules, *held.lookups.values()))
    assert not any(one.hits.any() for one in (rules, *lookups.values()))


def test_tables_are_chosen_by_the_share_of_tokens_that_are_right(evaluation: Evaluation) -> None:
    deep = Deep(evaluation, 0.3, SMALL)
    right = torch.zeros_like(deep.scores.correct)
    right[1, ::2] = 1
    deep.scores = deep.scores._replace(correct=right)
    assert deep.quality == [0, pytest.approx(right[1].mean().item()), 0]


def test_lookups_and_paces_go_from_few_passes_to_many(evaluation: Evaluation) -> None:
    """As lotteries want them, in whatever order they were asked for, and with the ends that every rule has."""
    deep = Deep(evaluation, 0.6, replace(SMALL, max_depth=6, unchanged=(0.0, 0.3, 0.6)))
    passes, places = torch.arange(6)[:, None], torch.arange(len(deep.scores.segments)) % 4
    deep.scores = deep.scores._replace(guesses=torch.minimum(passes, places))  # each place changes its own while
    lookups = deep.lookups([0.1, 0.3, 0.2, 0.2, 0.2, 0.4])
    means = {name: rules.passes.mean(1).tolist() for name, rules in lookups.items()}
    stops = [deep.unchanged(share).effort.passes.double().mean().item() for share in deep.plan.unchanged]
    assert 2 <= stops[2] < stops[1] < stops[0] < 6
    assert means == {"fixed": [1, 2, 3, 4, 5, 6], "table": [1, 2, 6], "unchanged": sorted([1, *stops, 6])}
    paces = deep.settle_rules([evaluation.settling(0.6, n_passes) for n_passes in (4, 2)])
    assert paces.passes.mean(1).tolist() == [1, 2, 4]


def test_without_validation_text_nothing_is_chosen(evaluation: Evaluation) -> None:
    found = evaluate(evaluation, SMALL)
    assert found.tables == {}
    assert not any(one.best for one in found.comparisons if one.kind == "gate")
    assert "table" not in {row.kind for row in found.rows}


def test_the_restored_text_is_the_original_with_the_guesses_at_the_masks(evaluation: Evaluation) -> None:
    judge, masked = Judge(evaluation, None), evaluation.masked(0.5)
    scores = evaluation.settling(0.5, 2).scores
    restored = judge.restored(masked, scores)
    assert (restored == evaluation.targets)[~masked].all()
    assert (restored[masked] == scores.guesses).all()
    assert ((restored == evaluation.targets)[masked].double() == scores.correct).all()


def test_the_table_has_a_line_a_setting_and_a_column_a_ratio(evaluation: Evaluation) -> None:
    fewer = {"settle_thresholds": (), "unchanged": (), "mask_predict": (), "ancestral": ()}
    plan = replace(SMALL, mask_ratios=(0.2, 0.5), max_depth=2, **fewer)
    found = evaluate(evaluation, plan)
    first_block = format_table(found.rows).split("\n\n")[0].splitlines()
    assert first_block[1].split() == ["0.2", "0.5"]
    assert [line.split()[:2] for line in first_block[2:]] == [
        ["fixed", "1"],
        ["fixed", "2"],
        ["gate", "0.1"],
        ["settle", "2"],
    ]
    assert "gate 0.1" in format_comparisons(found.comparisons)


def command(checkpoint: Path, text: Path, directory: Path, *more: str) -> list[str]:
    arguments = ["--checkpoint", str(checkpoint), "--text", str(text), "--cache-dir", str(directory / "cache")]
    arguments += ["--length", "12", "--segments", "3", "--max-depth", "2", "--mask-ratios", "0.2", "0.5"]
    return [*arguments, "--settle-passes", "2", "--ancestral", "2", "--mask-predict", "2", *more]


def brief(checkpoint: Path, text: Path, directory: Path, *more: str) -> list[str]:
    """A command that evaluates fixed depths alone, at one ratio."""
    none = ("--thresholds", "--unchanged", "--settle-passes", "--settle-thresholds", "--ancestral", "--mask-predict")
    return command(checkpoint, text, directory, *none, "--mask-ratios", "0.5", *more)


def test_the_command_writes_text_json_and_picture(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "validation.txt"
    other.write_text("the dog jumped over the fox .\n" * 10, encoding="utf-8")
    more = ["--output", str(tmp_path / "out"), "--validation", str(other), "--budgets", "2"]
    assert main(command(tiny_checkpoint, text_file, tmp_path, *more)) == 0
    printed = capsys.readouterr().out
    assert "exact match" in printed
    assert "depths chosen on validation text" in printed
    assert "passes left until the guesses stay" in printed
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert (summary["model"], summary["segments"], summary["text"]) == ("tiny", 3, text_file.name)
    n_settings = 2 + 5 + 1 + 5 + 1 + 4 + 1 + 2  # fixed, gate, table, unchanged, settle, settle-gate, rounds
    assert len(summary["rows"]) == 2 * n_settings
    assert summary["comparisons"][0].keys() >= {"difference", "interval", "saved", "best"}
    assert [(one["mask_ratio"], one["after"]) for one in summary["levels"]] == [(0.2, 1), (0.5, 1)]
    assert (tmp_path / "out" / "evaluation.txt").read_text(encoding="utf-8") == printed
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    kept = tallies.read(tmp_path / "out" / "evaluation.npz")
    assert len(kept) == len(summary["rows"])
    hits, counts = kept["fixed:1@0.5"]["exact_match"]
    first = next(
        row for row in summary["rows"] if (row["kind"], row["setting"], row["mask_ratio"]) == ("fixed", 1, 0.5)
    )
    assert first["exact_match"] == pytest.approx((hits.sum() / counts.sum()).item())


def test_the_command_computes_in_the_format_it_is_given(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        assert main(brief(tiny_checkpoint, text_file, tmp_path, "--precision", precision, "--output", str(out))) == 0
        summary = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
        assert summary["precision"] == precision
        bits[precision] = summary["rows"][0]["bits"]
    capsys.readouterr()
    assert bits["fp32"] != bits["bf16"]
    assert bits["fp32"] == pytest.approx(bits["bf16"], abs=0.05)


def test_weights_that_their_average_has_not_replaced_are_told(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = torch.load(tiny_checkpoint, weights_only=True)
    values["progress"] = {"average": [torch.zeros(2)], "averaged": False}
    source, text = tmp_path / "source.pt", tmp_path / "text.txt"
    torch.save(values, source)
    text.write_text("the cat sat on the mat . " * 20)
    assert main(brief(source, text, tmp_path)) == 0
    note = f"rdt-evaluate: {source}, the weights as they stood and not their running average"
    assert note in capsys.readouterr().err


def test_what_was_found_is_printed_also_if_it_cannot_be_kept(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "evaluation.json").mkdir(parents=True)
    assert main(brief(tiny_checkpoint, text_file, tmp_path, "--output", str(tmp_path / "out"))) == 2
    printed = capsys.readouterr()
    assert "exact match" in printed.out
    assert "evaluation.json" in printed.err


@pytest.mark.parametrize("failure", [OSError("no room"), KeyboardInterrupt()])
def test_files_that_cannot_be_written_leave_the_old_ones(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def half(path: Path, text: str, **_: str) -> None:
        path.write_bytes(text.encode()[:10])
        raise failure

    out = tmp_path / "out"
    out.mkdir()
    for kind in ("json", "txt", "npz", "png"):
        (out / f"evaluation.{kind}").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_text", half)
    assert main(brief(tiny_checkpoint, text_file, tmp_path, "--output", str(out))) in (2, 130)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        f"evaluation.{kind}": b"old" for kind in ("json", "txt", "npz", "png")
    }


def test_a_full_standard_output_costs_no_file(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(brief(tiny_checkpoint, text_file, tmp_path, "--output", str(tmp_path / "out"))) == 2
    assert (tmp_path / "out" / "evaluation.json").is_file()


def test_a_text_without_a_known_word_is_named(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = tmp_path / "unknown.txt"
    unknown.write_text("<unk> " * 100 + "\n" + "the fox", encoding="utf-8")
    assert main(command(tiny_checkpoint, unknown, tmp_path)) == 2
    assert capsys.readouterr().err == (
        "rdt-evaluate: --text has no word to mask at --mask-ratios 0.2: they are too few, or all unknown\n"
    )
    both = command(
        tiny_checkpoint, text_file, tmp_path, "--text", f"{text_file},{unknown}", "--validation", str(unknown)
    )
    assert main(both) == 2
    assert "--validation is --text" in capsys.readouterr().err


def test_a_text_of_one_segment_has_no_intervals(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a b c d e f g h\n", encoding="utf-8")
    assert main(["--checkpoint", str(tiny_checkpoint), "--text", str(text), "--length", "8"]) == 2
    problem = "--text has one segment of 8 tokens: want 2, intervals are of their differences"
    assert capsys.readouterr().err == f"rdt-evaluate: {problem}\n"


def test_a_validation_text_that_is_too_short_is_named(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    for words, problem in (("a b c d e f g", "one segment of 8 tokens"), ("a b c", "3 tokens")):
        short.write_text(words, encoding="utf-8")
        assert main(command(tiny_checkpoint, text_file, tmp_path, "--validation", str(short), "--length", "8")) == 2
        assert capsys.readouterr().err.startswith(f"rdt-evaluate: --validation has {problem}: want ")


def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "none.pt"), "--text", "x.txt"]) == 2
    assert capsys.readouterr().err == f"rdt-evaluate: {tmp_path / 'none.pt'}: no such file\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--mask-ratios", "0.2", "1.5"], "--mask-ratios has 1.5: want above 0, up to 1"),
        (["--ancestral", "0"], "--ancestral is 0: want >= 1"),
        (["--budgets", "0.5"], "--budgets is 0.5: want >= 1"),
        (["--budgets", "inf"], "--budgets is inf: want >= 1"),
        (["--round-depth", "0"], "--round-depth is 0: want >= 1"),
        (["--thresholds", "nan"], "--thresholds is nan: want >= 0"),
        (["--precision", "tf32"], "--precision is tf32: want a CUDA device, not cpu"),
        (["--length", "2"], "--length is 2: want >= 3"),
        (["--length", "33"], "--length is 33: the model takes at most 32 tokens"),
        (["--segments", "1"], "--segments is 1: want >= 2"),
        (["--seed", "-1"], "--seed is -1: want >= 0"),
        (["--batch-size", "0"], "--batch-size is 0: want >= 1"),
        (["--batch-size", "100000000"], "--batch-size is 100000000: that is 12800000000 tokens, want <= 1048576"),
        (["--max-depth", "1001"], "--max-depth is 1001: want <= 1000"),
        (["--settle-passes", "4", "1001"], "--settle-passes is 1001: want <= 1000"),
        (["--mask-predict", "1001"], "--mask-predict is 1001: want <= 1000"),
        (["--ancestral", "1001"], "--ancestral is 1001: want <= 1000"),
        (["--round-depth", "1001"], "--round-depth is 1001: want <= 1000"),
        (["--device", "meta"], "--device is meta: want auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], f"--device is cuda:99: this machine has {N_CARDS} usable CUDA devices"),
        (["--output", "/dev/null"], "--output is '/dev/null': want a folder to write in: File exists"),
        (["--output", "/dev/null/out"], "--output is '/dev/null/out': want a folder to write in: Not a directory"),
        (["--validation", "./x.txt"], "--validation is --text: what is chosen must be chosen on other text"),
    ],
)
def test_settings_out_of_range_are_one_line(
    tiny_checkpoint: Path, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(tiny_checkpoint), "--text", "x.txt", *arguments]) == 2
    assert capsys.readouterr().err == f"rdt-evaluate: {problem}\n"


def test_a_reader_who_has_seen_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert print_text("a line") == 0
        print("what is flushed at the end goes nowhere")
