from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rdt_core import RDT, Tokenizer, flops, restore
from training.config import ConfigError
from training.evaluate import Evaluation, cut_segments, evaluate, halting_depths, main
from training.report import format_table


@pytest.fixture
def evaluation(tiny_model: RDT, tiny_tokenizer: Tokenizer) -> Evaluation:
    stream = torch.randint(5, tiny_tokenizer.vocab_size, (60,), generator=torch.Generator().manual_seed(0))
    segments = cut_segments(stream, tiny_tokenizer, length=12, at_most=None)
    return Evaluation(tiny_model, tiny_tokenizer, segments, seed=0, batch_size=4)


def test_segments_are_contiguous_and_framed(tiny_tokenizer: Tokenizer) -> None:
    segments = cut_segments(torch.arange(10, 33), tiny_tokenizer, length=7, at_most=None)
    assert [segment[1:-1].tolist() for segment in segments] == [list(range(10 + 5 * i, 15 + 5 * i)) for i in range(4)]
    assert all((s[0], s[-1]) == (tiny_tokenizer.cls_id, tiny_tokenizer.sep_id) for s in segments)


def test_fewer_segments_are_spread_over_the_text(tiny_tokenizer: Tokenizer) -> None:
    segments = cut_segments(torch.arange(100), tiny_tokenizer, length=12, at_most=2)
    assert [int(segment[1]) for segment in segments] == [0, 50]


def test_a_text_shorter_than_a_segment_is_an_error(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="--text has 3 tokens: want at least --length = 7"):
        cut_segments(torch.arange(3), tiny_tokenizer, length=7, at_most=None)


def test_a_sequence_halts_at_the_first_pass_below_the_threshold() -> None:
    levels = torch.tensor([[0.9, 0.04, 0.5], [0.3, 0.03, 0.5], [0.04, 0.02, 0.5]])
    assert halting_depths(levels, 0.05).tolist() == [3, 1, 3]


def test_a_threshold_above_every_level_is_a_depth_of_one(evaluation: Evaluation) -> None:
    rows = evaluate(evaluation, [0.3], max_depth=4, thresholds=[2.0, 0.0], settle_passes=[1])
    by_setting = {(row.kind, row.setting): row for row in rows}
    for kind, setting, depth in (("gate", 2.0, 1), ("gate", 0.0, 4), ("settle", 1, 1)):
        row, fixed = by_setting[kind, setting], by_setting["fixed", depth]
        assert row.exact_match == fixed.exact_match
        assert row.bits == pytest.approx(fixed.bits)
        assert row.passes == depth
        assert row.flops_per_token == fixed.flops_per_token


@pytest.mark.parametrize("halting", ["gate", "settle"])
def test_the_scores_are_those_of_the_reference(evaluation: Evaluation, halting: str) -> None:
    model, mask_id = evaluation.model, evaluation.tokenizer.mask_id
    hits = masks = 0
    for targets, ranks in zip(evaluation.targets, evaluation.ranks, strict=True):
        masked = ranks < 0.5
        tokens = torch.where(masked, mask_id, targets)
        restored = restore(model, tokens, masked, max_steps=3, threshold=0.0, halting=halting)  # type: ignore[arg-type]
        hits += int((torch.tensor(restored.tokens) == targets)[masked].sum())
        masks += int(masked.sum())
    scores = evaluation.settling(0.5, 3) if halting == "settle" else evaluation.depths(0.5, 3)[0]
    correct = scores.correct if halting == "settle" else scores.correct[-1]
    assert (int(correct.sum()), len(correct)) == (hits, masks)
    assert math.isfinite(scores.nats.sum().item())


def test_the_masks_of_smaller_ratios_are_inside_those_of_larger_ones(evaluation: Evaluation) -> None:
    assert ((evaluation.ranks < 0.2) <= (evaluation.ranks < 0.6)).all()


def test_the_table_has_a_line_a_setting_and_a_column_a_ratio(evaluation: Evaluation) -> None:
    rows = evaluate(evaluation, [0.2, 0.5], max_depth=2, thresholds=[0.1], settle_passes=[2])
    first_block = format_table(rows).split("\n\n")[0].splitlines()
    assert first_block[1].split() == ["0.2", "0.5"]
    assert [line.split()[:2] for line in first_block[2:]] == [
        ["fixed", "1"],
        ["fixed", "2"],
        ["gate", "0.1"],
        ["settle", "2"],
    ]


def test_work_grows_with_passes_by_the_encoder_alone(evaluation: Evaluation) -> None:
    config = evaluation.model.config
    one, three = (flops.sequence_flops(config, 10, 4, steps) for steps in (1, 3))
    assert three - one == 2 * 10 * flops.pass_flops(config, 10)
    more_rows = flops.sequence_flops(config, 10, 5, 1) - one
    assert more_rows == 2 * config.d_model * config.vocab_size


def test_the_command_writes_text_json_and_picture(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(tiny_checkpoint), "--text", str(text_file), "--output", str(tmp_path / "out")]
    arguments += ["--length", "12", "--segments", "3", "--mask-ratios", "0.2", "0.5", "--max-depth", "2"]
    assert main([*arguments, "--cache-dir", str(tmp_path / "cache"), "--settle-passes", "2"]) == 0
    assert "exact match" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert (summary["model"], summary["segments"], len(summary["rows"])) == ("tiny", 3, 2 * (2 + 5 + 1))
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "none.pt"), "--text", "x.txt"]) == 2
    assert capsys.readouterr().err == f"rdt-evaluate: {tmp_path / 'none.pt'}: no such file\n"
