from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import training
from training.config import ConfigError, differences
from training.config_file import load_config, parse_config

CONFIGS = sorted((Path(training.__file__).parent / "configs").glob("*.yaml"))


def nested(key: str, value: object) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def refusal(key: str, value: object) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(nested(key, value))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_ships_parses(path: Path) -> None:
    assert load_config(path).model.d_model > 0


def test_some_config_ships() -> None:
    assert CONFIGS


def test_the_override_file_beats_the_config_and_assignments_beat_both(tmp_path: Path) -> None:
    base, over = tmp_path / "base.yaml", tmp_path / "over.yaml"
    base.write_text(yaml.safe_dump({"seed": 1, "training": {"batch_size": 2, "num_epochs": 3, "num_steps": 4}}))
    over.write_text(yaml.safe_dump({"training": {"num_epochs": 30, "num_steps": None}}))
    config = load_config(base, over, ["training.num_epochs=300", "model.dropout=0", "name=trial"])
    assert (config.seed, config.name) == (1, "trial")
    assert (config.training.batch_size, config.training.num_epochs, config.training.num_steps) == (2, 300, None)
    assert config.model.dropout == 0.0
    assert load_config(base, over).training.num_epochs == 30
    assert load_config(base).training.num_steps == 4


def test_a_section_without_keys_does_not_take_the_place_of_another(tmp_path: Path) -> None:
    """As where all its keys were made comments."""
    base, over = tmp_path / "base.yaml", tmp_path / "over.yaml"
    base.write_text("training: {num_epochs: 3}")
    over.write_text("training:\n")
    with pytest.raises(ConfigError, match=r"^training is None: want keys under it$"):
        load_config(base, over, ["training.batch_size=2"])


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == parse_config({})


@pytest.mark.parametrize("key", ["colour", "model.colour", "training.colour", "data.colour", "output.colour"])
def test_an_unknown_key_is_named_with_its_section(key: str) -> None:
    assert refusal(key, 1).startswith(f"{key} is not a setting; known here: ")


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("batch_size", "training.batch_size"),
        ("data.batch_size", "training.batch_size"),
        ("data.max_seq_len", "model.max_seq_len"),
        ("training.seed", "seed"),
    ],
)
def test_a_key_of_another_section_is_told_which(key: str, wanted: str) -> None:
    assert refusal(key, 1) == f"{key} is not a setting, but {wanted} is"


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("training.batch_size", "many", "want int"),
        ("training.batch_size", True, "want int"),
        ("training.batch_size", 1.5, "want int"),
        ("training.num_steps", "all", "want int or null"),
        ("training.learning_rate", "fast", "want float"),
        ("training.learning_rate", None, "want float"),
        ("training.learning_rate", True, "want float"),
        ("model.level_conditioning", "yes", "want bool"),
        ("model.level_conditioning", 1, "want bool"),
        ("data.dataset_name", 5, "want str"),
        ("training.init_from", 5, "want str or null"),
        ("model", 5, "want keys under it"),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, value: object, wanted: str) -> None:
    assert refusal(key, value) == f"{key} is {value!r}: {wanted}"


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("training.batch_size", 0, ">= 1"),
        ("training.num_steps", 0, ">= 1"),
        ("training.keep_last_n_checkpoints", 0, ">= 1"),
        ("output.log_every_n_steps", 0, ">= 1"),
        ("training.gate_passes", 1, ">= 2"),
        ("data.min_seq_length", 2, ">= 3"),
        ("training.batch_size", 8193, "1048704 tokens with data.max_seq_length = 128, want <= 1048576"),
        ("training.total_steps", 10**9, "want <= 1000"),
        ("training.max_chain_length", 1001, "want <= 1000"),
        ("training.gate_passes", 1001, "want <= 1000"),
        ("data.num_workers", 10**9, "want <= 1000"),
        ("seed", -1, ">= 0"),
        ("training.weight_decay", float("nan"), "finite"),
        ("training.weight_decay", float("inf"), "finite"),
        ("training.learning_rate", 0, "> 0"),
        ("training.learning_rate", float("inf"), "finite"),
        ("training.learning_rate", 10**400, "finite"),
        ("training.max_grad_norm", -1, "> 0"),
        ("training.warmup_ratio", 1.5, "0 to 1"),
        ("data.full_length_share", -0.5, "0 to 1"),
        ("training.adam_beta2", 1, "0 to 1, ends excluded"),
        ("training.average_decay", 0.0, "0 to 1, ends excluded"),
        ("training.scheduler", "constant", "one of cosine, linear, warmup_stable_decay"),
        ("training.scheme", "both", "one of unroll, chain"),
        ("training.masking_strategy", "sine", "one of linear, cosine, exponential, random"),
        ("model.decoder_type", "mlp", "one of linear, dense, transformer"),
        ("model.halting", "never", "one of gate, settle"),
        ("model.norm", "none", "one of pre, post"),
        ("model.positions", "sine", "one of rotary, learned"),
        ("data.max_seq_length", 600, "data.min_seq_length = 16 to model.max_seq_len = 512"),
        ("data.max_seq_length", 8, "data.min_seq_length = 16 to model.max_seq_len = 512"),
    ],
)
def test_a_value_out_of_its_range_is_refused(key: str, value: Any, wanted: str) -> None:
    message = refusal(key, value)
    assert message.startswith(f"{key} is ")
    assert wanted in message


@pytest.mark.parametrize("blank", ["", "  ", "\t"])
@pytest.mark.parametrize(
    "key",
    [
        "name",
        "data.dataset_name",
        "data.validation_name",
        "data.tokenizer_name",
        "data.cache_dir",
        "training.init_from",
        "output.checkpoint_dir",
        "output.log_dir",
    ],
)
def test_a_blank_name_is_refused(key: str, blank: str) -> None:
    assert refusal(key, blank).startswith(f"{key} is {blank!r}: want a name")


@pytest.mark.parametrize("name", ["two\nlines", "no-break\xa0space", "x" * 256])
def test_a_name_that_no_checkpoint_may_have_is_refused(name: str) -> None:
    assert re.fullmatch(r"name is '.*': want at most 255 printable characters", refusal("name", name))
    assert parse_config({"name": "é" * 255}).name == "é" * 255


@pytest.mark.parametrize("key", ["data.dataset_name", "data.validation_name"])
@pytest.mark.parametrize("names", [",", " , ", "a.txt,", ",a.txt", "a.txt, ,b.txt"])
def test_a_list_of_texts_has_no_gaps(key: str, names: str) -> None:
    assert refusal(key, names) == f"{key} is {names!r}: want a name, or several between commas"


def test_a_chain_has_no_stage_for_the_gate() -> None:
    with pytest.raises(ConfigError, match=r"training.gate_steps is for scheme unroll"):
        parse_config({"training": {"scheme": "chain", "gate_steps": 10}})


def test_differences_name_what_both_have() -> None:
    before = {"seed": 0, "data": {"num_workers": 0, "cache_dir": "a", "dataset_name": "a.txt"}, "old": 1}
    now = {"seed": 0, "data": {"num_workers": 2, "cache_dir": "b", "dataset_name": "b.txt"}, "new": 1}
    assert differences(before, now) == {"data.dataset_name": "a.txt -> b.txt"}


def test_corruption_shares_add_up_to_one_at_the_most() -> None:
    with pytest.raises(ConfigError, match=r"training.random_token_share \+ training.keep_token_share is over 1"):
        parse_config({"training": {"random_token_share": 0.6, "keep_token_share": 0.6}})


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text("training: {learning_rate: 3e-4, weight_decay: 1}")
    assert load_config(path).training.learning_rate == 3e-4
    assert load_config(path, None, ["training.learning_rate=1e-5"]).training.learning_rate == 1e-5
    weight_decay = load_config(path).training.weight_decay
    assert isinstance(weight_decay, float)
    assert weight_decay == 1.0


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "010", 10),
        ("seed", "0", 0),
        ("training.num_steps", "null", None),
        ("training.num_steps", "1000", 1000),
        ("training.num_steps", "1_000", 1000),
        ("training.weight_decay", "010", 10.0),
        ("training.average_decay", "null", None),
        ("training.average_decay", ".9", 0.9),
        ("mixed_precision", "false", False),
        ("mixed_precision", "True", True),
        ("training.init_from", "null", None),
        ("output.log_dir", "run #2", "run #2"),
        ("output.log_dir", "it's 'one': {", "it's 'one': {"),
        ("output.log_dir", "2024-11-30", "2024-11-30"),
        ("output.log_dir", "a=b", "a=b"),
        ("name", "on", "on"),
        ("name", "true", "true"),
        ("name", "1:30", "1:30"),
    ],
)
def test_the_value_of_an_assignment_is_what_it_looks_like(tmp_path: Path, key: str, text: str, value: object) -> None:
    path = tmp_path / "base.yaml"
    path.write_text("")
    found: Any = load_config(path, None, [f"{key}={text}"])
    for part in key.split("."):
        found = getattr(found, part)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        ("training.batch_size", "'training.batch_size': want section.key=value"),
        ("=3", "'=3': want section.key=value"),
        ("", "'': want section.key=value"),
        ("training.batch_size=[", "training.batch_size is '[': want int"),
        ("training.batch_size=", "training.batch_size is '': want int"),
        ("training.batch_size=1:30", "training.batch_size is '1:30': want int"),
        ("training.batch_size=0x10", "training.batch_size is '0x10': want int"),
        ("training.batch_size=null", "training.batch_size is 'null': want int"),
        ("training.learning_rate=nan", "training.learning_rate is 'nan': want a finite number"),
        ("mixed_precision=on", "mixed_precision is 'on': want bool"),
        ("mixed_precision=null", "mixed_precision is 'null': want bool"),
        ("training=5", "training is '5': want keys under it"),
        ("data={num_workers: 1}", "data is '{num_workers: 1}': want keys under it"),
        ("seed.deeper=1", "seed is {'deeper': '1'}: want int"),
        (f"seed={'9' * 5000}", f"seed is '{'9' * 5000}': want int"),
    ],
)
def test_an_assignment_that_makes_no_sense_is_refused(tmp_path: Path, assignment: str, problem: str) -> None:
    path = tmp_path / "base.yaml"
    path.write_text("")
    with pytest.raises(ConfigError) as error:
        load_config(path, None, [assignment])
    assert str(error.value) == problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1\nb: }", "not YAML"),
        ("name: 2026-28-11", "not YAML: month must be in 1..12"),
        ("- 1\n- 2", "holds a list, want sections with keys"),
        ("seed: 1\ndata: {}\nseed: 2", "not YAML: seed is given twice in .*, line 3, column 1"),
        ("training:\n  num_steps: 1\n  num_steps: 1", "not YAML: num_steps is given twice in .*, line 3, column 3"),
        ("model: {}\n'model': {}", "not YAML: model is given twice"),
        ("seed: " + "[" * 3000, "not YAML: maximum recursion depth exceeded"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")


def test_a_chain_is_no_longer_than_there_are_steps_of_masking() -> None:
    section = {"scheme": "chain", "max_chain_length": 9, "total_steps": 8}
    with pytest.raises(ConfigError, match=r"training\.max_chain_length is 9: with scheme chain want at most .* = 8"):
        parse_config({"training": section})


def test_something_has_to_be_learned() -> None:
    with pytest.raises(ConfigError, match="want one of them above"):
        parse_config({"training": {"loss_weight_recon": 0.0, "loss_weight_gate": 0.0}})
