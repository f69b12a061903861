from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rdt_core import Tokenizer, checkpoint
from rdt_core.checkpoint import CheckpointError
from training.corpus import local_corpus
from training.data import stable_seed
from training.evaluate import main as evaluate
from training.evaluation.causal import CausalConfig, CausalLM, Scorer, load_scorer
from training.mixed_precision import cpu_has_bfloat16
from training.scorer import bits_a_token, drawn_texts, main, train


@pytest.fixture(scope="module")
def scorer_file(text_file: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that has read the two sentences of the corpus a hundred times or so."""
    directory = tmp_path_factory.mktemp("scorer")
    path = directory / "scorer.pt"
    arguments = ["--text", str(text_file), "--tokenizer", str(tokenizer_file), "--output", str(path), "--steps", "40"]
    arguments += ["--batch-size", "8", "--length", "16", "--d-model", "32", "--heads", "2", "--layers", "1"]
    assert main([*arguments, "--learning-rate", "0.01", "--cache-dir", str(directory / "cache")]) == 0
    return path


def texts_of(text_file: Path, tokenizer: Tokenizer, directory: Path, n: int, length: int) -> torch.Tensor:
    return drawn_texts(local_corpus(str(text_file), tokenizer, directory), tokenizer, length, n, seed=9)


def test_the_loss_falls(text_file: Path, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    corpus = local_corpus(str(text_file), tiny_tokenizer, tmp_path)
    model = CausalLM(CausalConfig(tiny_tokenizer.vocab_size, d_model=32, n_heads=2, n_layers=1, d_ff=64))
    steps = train(model, corpus, tiny_tokenizer, n_steps=25, batch_size=8, length=16, learning_rate=1e-2, seed=0)
    losses = list(steps)
    assert len(losses) == 25
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_is_adamw_on_the_gradient_of_its_own_texts_alone(
    text_file: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.scorer.autocast", lambda _: nullcontext())
    corpus = local_corpus(str(text_file), tiny_tokenizer, tmp_path)
    config = CausalConfig(tiny_tokenizer.vocab_size, d_model=16, n_heads=2, n_layers=1, d_ff=32)
    torch.manual_seed(0)
    model, ours = CausalLM(config), CausalLM(config)
    ours.load_state_dict(model.state_dict())
    n_steps, peak = 40, 0.01
    given = train(model, corpus, tiny_tokenizer, n_steps=n_steps, batch_size=2, length=8, learning_rate=peak, seed=3)
    losses = list(given)
    optimizer = torch.optim.AdamW(ours.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    expected = []
    for step in range(n_steps):
        factor = (step + 1) / 2 if step < 1 else (n_steps - step) / (n_steps - 2)
        texts = drawn_texts(corpus, tiny_tokenizer, 8, 2, stable_seed(3, step))
        logits = ours(texts)[:, :-2]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = peak * min(1.0, factor)
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-3)


def test_bits_of_segments_are_their_mean(scorer_file: Path, text_file: Path, tiny_tokenizer: Tokenizer) -> None:
    scorer = load_scorer(scorer_file)
    texts = texts_of(text_file, tiny_tokenizer, scorer_file.parent / "cache", n=3, length=12)
    words = scorer.bits(texts)[:, 1:-1]
    assert bits_a_token(scorer.model, list(texts)) == pytest.approx(words.mean().item(), rel=1e-4)


def test_the_last_words_are_drawn_too(text_file: Path, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = local_corpus(str(text_file), tiny_tokenizer, tmp_path)
    few, _ = whole.split(len(whole) - 5)
    drawn = drawn_texts(few, tiny_tokenizer, 6, 200, seed=0)
    wanted = {tuple(few.tokens[start : start + 4].tolist()) for start in (0, 1)}
    assert {tuple(body) for body in drawn[:, 1:-1].tolist()} == wanted


def test_a_text_like_those_it_read_is_likelier_than_the_same_words_shuffled(
    scorer_file: Path, text_file: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    scorer = load_scorer(scorer_file)
    texts = texts_of(text_file, tiny_tokenizer, tmp_path, n=8, length=16)
    order = 1 + torch.randperm(14, generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat((texts[:, :1], texts[:, order], texts[:, -1:]), 1)
    bits, worse = scorer.bits(texts), scorer.bits(shuffled)
    assert bits.shape == (8, 16)
    assert (bits[:, 1:-1].sum(1) < worse[:, 1:-1].sum(1)).all()
    assert bits[:, 1:-1].mean() < 0.5 * worse[:, 1:-1].mean()
    assert (bits[:, [0, -1]] == 0).all()


def test_a_token_is_scored_by_what_is_left_of_it(scorer_file: Path, tiny_tokenizer: Tokenizer) -> None:
    scorer = load_scorer(scorer_file)
    texts = torch.tensor([[tiny_tokenizer.cls_id, *range(10, 18), tiny_tokenizer.sep_id]])
    changed = texts.clone()
    changed[0, 5] = 40
    before, after = scorer.bits(texts)[0], scorer.bits(changed)[0]
    torch.testing.assert_close(before[:5], after[:5])
    assert (before[5:9] != after[5:9]).all()


def test_bits_are_those_of_the_distribution_the_model_states(scorer_file: Path, tiny_tokenizer: Tokenizer) -> None:
    scorer = load_scorer(scorer_file)
    texts = torch.tensor([[tiny_tokenizer.cls_id, *range(10, 18), tiny_tokenizer.sep_id]])
    stated = scorer.model(texts).softmax(-1)
    assert scorer.bits(texts)[0, 4].item() == pytest.approx(-stated[0, 3, texts[0, 4]].log2().item(), rel=1e-4)


def test_bits_in_bfloat16_are_about_those_in_float32(
    scorer_file: Path, text_file: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = texts_of(text_file, tiny_tokenizer, tmp_path, n=8, length=16)
    exact, rounded = (load_scorer(scorer_file, bfloat16=wanted).bits(texts) for wanted in (False, True))
    assert rounded.mean().item() == pytest.approx(exact.mean().item(), rel=0.02)
    assert torch.equal(exact, rounded) is not cpu_has_bfloat16()


def test_training_is_the_same_for_a_seed(text_file: Path, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = (texts_of(text_file, tiny_tokenizer, tmp_path, n=4, length=10) for _ in range(2))
    assert torch.equal(first, second)
    assert (first[:, 0] == tiny_tokenizer.cls_id).all()
    assert (first[:, -1] == tiny_tokenizer.sep_id).all()


def test_the_file_holds_tensors_and_plain_values(scorer_file: Path, text_file: Path) -> None:
    values = torch.load(scorer_file, weights_only=True)
    assert values["config"]["scorer"]["d_model"] == 32
    assert values["config"]["training"]["text"] == text_file.name
    scorer = load_scorer(scorer_file)
    assert isinstance(scorer, Scorer)
    assert (scorer.name, scorer.text) == ("scorer", text_file.name)


def test_a_model_that_fills_masks_is_no_scorer(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="config has no 'scorer' section"):
        load_scorer(tiny_checkpoint)


def test_weights_of_another_shape_are_refused(scorer_file: Path, tmp_path: Path) -> None:
    values = torch.load(scorer_file, weights_only=True)
    values["config"]["scorer"]["n_layers"] = 2
    torch.save(values, tmp_path / "wrong.pt")
    with pytest.raises(CheckpointError, match=r"wrong\.pt: Error.* in loading"):
        load_scorer(tmp_path / "wrong.pt")


@pytest.fixture
def files(text_file: Path, tokenizer_file: Path, tmp_path: Path) -> list[str]:
    where = ["--text", str(text_file), "--tokenizer", str(tokenizer_file), "--output", str(tmp_path / "scorer.pt")]
    return [*where, "--cache-dir", str(tmp_path)]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--length", "2"], "--length is 2: want >= 3"),
        (["--steps", "0"], "--steps is 0: want >= 1"),
        (["--seed", "-1"], "--seed is -1: want >= 0"),
        (["--learning-rate", "inf"], "--learning-rate is inf: want a number > 0"),
        (["--device", "abacus"], "--device is abacus: want auto, cpu, cuda or cuda:N"),
        (["--output", "/dev/null/scorer.pt"], "the folder of --output is '/dev/null': want a folder to write in"),
        (["--cache-dir", "/dev/null"], "--cache-dir is '/dev/null': want a folder to write in"),
        (["--d-model", "30", "--heads", "4"], "--d-model is 30: want a multiple of 2 x --heads = 8"),
        (["--heads", "0"], "--heads is 0: want >= 1"),
        (["--tokenizer", "none.json"], "--tokenizer is 'none.json': no such file"),
        (["--length", "1000"], "tokens: want at least 9980, ten times --length without its ends: a tenth is held out"),
        (["--batch-size", "1000000000"], "--batch-size is 1000000000: that is 128000000000 tokens, want <= 1048576"),
        (["--layers", "1001"], "--layers is 1001: want <= 1000"),
        (["--d-model", "1000000000000000000"], "a model of this size cannot be made: "),
    ],
)
def test_settings_out_of_range_are_one_line(
    files: list[str], arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*files, *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("rdt-scorer: ")
    assert problem in printed
    assert printed.count("\n") == 1


def test_an_evaluation_scores_the_restored_text(
    scorer_file: Path, tiny_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(tiny_checkpoint), "--text", str(text_file), "--output", str(tmp_path / "out")]
    arguments += ["--scorer", str(scorer_file), "--cache-dir", str(tmp_path), "--length", "16", "--segments", "4"]
    arguments += ["--mask-ratios", "0.5", "--max-depth", "1", "--unchanged", "--settle-passes", "--settle-thresholds"]
    assert evaluate([*arguments, "--mask-predict", "--ancestral"]) == 0
    assert "bits a restored token under the left-to-right model" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert summary["scorer"]["text"] == text_file.name
    row = summary["rows"][0]
    assert row["lm_bits"] > summary["original_lm_bits"]["0.5"]  # random weights write nothing likely
    assert row["lm_excess_bits"] > 0
    assert row["lm_bits_interval"] > 0


def test_what_was_learned_before_it_is_measured_is_told(
    scorer_file: Path, tiny_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On text that the model knows a table flatters it, and so does a scorer that knows what it knows."""
    other, learned = tmp_path / "other.txt", tmp_path / "learned.pt"
    other.write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")

    def told(text: Path, names: str) -> list[str]:
        saved = checkpoint.read(tiny_checkpoint)
        training = {"training": {"data": {"dataset_name": names}}}
        checkpoint.save(learned, replace(saved, config=saved.config | training))
        arguments = ["--checkpoint", str(learned), "--text", str(text), "--mask-ratios", "0.5", "--max-depth", "1"]
        arguments += ["--scorer", str(scorer_file), "--cache-dir", str(tmp_path), "--length", "16", "--segments", "4"]
        none = ["--thresholds", "--unchanged", "--budgets", "--settle-passes", "--settle-thresholds", "--mask-predict"]
        assert evaluate([*arguments, *none, "--ancestral"]) == 0
        return [line for line in capsys.readouterr().err.split("\n") if line.startswith("rdt-evaluate: ")]

    both = f"rdt-evaluate: the scorer and the model both learned from {text_file.name}"
    itself = f"rdt-evaluate: the model has learned from {text_file.name}"
    assert told(text_file, f"elsewhere/first.txt, elsewhere/{text_file.name}") == [both, itself]
    assert told(other, f"elsewhere/{text_file.name}") == [both]
    assert told(text_file, "elsewhere/first.txt") == []


def test_a_scorer_that_does_not_say_what_it_read_scores_all_the_same(scorer_file: Path, tmp_path: Path) -> None:
    for number, training in enumerate(("lost", None, {})):
        saved = checkpoint.read(scorer_file)
        path = tmp_path / f"{number}.pt"
        checkpoint.save(path, replace(saved, config=saved.config | {"training": training}))
        assert load_scorer(path).text == ""


def test_a_scorer_that_diverges_is_not_saved(
    text_file: Path, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scorer.pt"
    arguments = ["--text", str(text_file), "--tokenizer", str(tokenizer_file), "--output", str(path), "--steps", "3"]
    arguments += ["--batch-size", "8", "--length", "16", "--d-model", "32", "--heads", "2", "--layers", "1"]
    assert main([*arguments, "--learning-rate", "1e30", "--cache-dir", str(tmp_path)]) == 2
    assert "the scorer has diverged" in capsys.readouterr().err
    assert not path.exists()
