from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from rdt_core.decoding import LEAST_TOP
from service.settings import Settings, SettingsError, read_settings, unknown_variables


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RDT_")]:
        monkeypatch.delenv(name)


def test_defaults() -> None:
    settings = read_settings([])
    assert settings.checkpoint == Path("models/rdt-small/best_model.pt")
    assert (settings.host, settings.http_port, settings.device, settings.precision) == (
        "127.0.0.1",
        8000,
        "auto",
        "auto",
    )
    assert (settings.grpc_port, settings.max_batch_items) == (50051, 64)
    assert settings.api_key is None
    assert settings.threads >= 1


def test_a_flag_beats_the_environment_beats_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDT_HTTP_PORT", "9001")
    monkeypatch.setenv("RDT_GRACE_SECONDS", "2.5")
    assert read_settings([]).http_port == 9001
    settings = read_settings(["--http_port", "9002"])
    assert (settings.http_port, settings.grace_seconds) == (9002, 2.5)


@pytest.mark.parametrize("flags", [["--max_top_k=3"], ["--max-top-k=3"], ["--max-top-k", "3"], ["--max_top_k", "3"]])
def test_flags_may_be_written_either_way(flags: list[str]) -> None:
    assert read_settings(flags).max_top_k == 3


def test_only_the_name_of_a_flag_is_rewritten() -> None:
    assert read_settings(["--checkpoint=a-b/c--d.pt", "--host", "my-host"]).checkpoint == Path("a-b/c--d.pt")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--http_port", "65536"], "http_port (RDT_HTTP_PORT)"),
        (["--grpc_port", "65536"], "grpc_port (RDT_GRPC_PORT)"),
        (["--max_batch_items", "0"], "max_batch_items"),
        (["--http_port", "http"], 'is "http"'),
        (["--device", "tpu"], "device"),
        (["--device", "cuda:x"], "device"),
        (["--precision", "fp8"], "precision"),
        (["--max_waiting", "0"], "max_waiting"),
        (["--max_waiting_tokens", "0"], "max_waiting_tokens"),
        (["--max_steps_limit", "0"], "max_steps_limit"),
        (["--max_body_bytes", "0"], "max_body_bytes"),
        (["--max_body_bytes", "3000000000"], "max_body_bytes"),
        (["--max_steps_limit", "100000000000000000000000"], "max_steps_limit"),
        (["--grace_seconds", "nan"], "grace_seconds"),
        (["--grace_seconds", "-1"], "grace_seconds"),
        (["--threads", "0"], "threads"),
        (["--log_level", "loud"], "log_level"),
        (["--host", ""], 'host (RDT_HOST) is "": want a name or an address'),
        (["--host", "  "], 'host (RDT_HOST) is "  ": want a name or an address'),
        (["--host", "é..host"], 'host (RDT_HOST) is "é..host": want a name or an address'),
        (["--host", "\udcff"], 'host (RDT_HOST) is "\\\\udcff": want a name or an address'),
        (["--checkpoint", ""], 'checkpoint (RDT_CHECKPOINT) is "": want the name of a file'),
        (["--checkpoint", "  "], 'checkpoint (RDT_CHECKPOINT) is "  ": want the name of a file'),
    ],
)
def test_a_bad_setting_is_named(flags: list[str], named: str) -> None:
    with pytest.raises(SettingsError) as error:
        read_settings(flags)
    assert named in str(error.value)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_what_is_wanted_is_said_in_words_with_the_range(name: str) -> None:
    wrong = "x" if name not in ("checkpoint", "host", "api_key", "admin_key") else " "
    with pytest.raises(SettingsError) as error:
        read_settings([f"--{name}={wrong}"])
    _, _, wanted = str(error.value).partition(": want ")
    assert wanted
    assert "^" not in wanted, "no regular expression"
    kind = Settings.model_fields[name].annotation
    assert (kind not in (int, float)) or re.fullmatch(r"a (whole|finite) number (from \d+ to \d+|>= 0)", wanted)


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--device=tpu", 'device (RDT_DEVICE) is "tpu": want auto, cpu, cuda or cuda:N'),
        ("--devices=0-1", 'devices (RDT_DEVICES) is "0-1": want numbers of CUDA devices, such as 0,1'),
        (
            "--otel_endpoint=c:1",
            'otel_endpoint (RDT_OTEL_ENDPOINT) is "c:1": want http://HOST:PORT or https://HOST:PORT',
        ),
        ("--threads=0", 'threads (RDT_THREADS) is "0": want a whole number from 1 to 1024'),
        ("--threads=two", 'threads (RDT_THREADS) is "two": want a whole number from 1 to 1024'),
        ("--grace_seconds=inf", 'grace_seconds (RDT_GRACE_SECONDS) is "inf": want a finite number >= 0'),
        ("--shed=all", 'shed (RDT_SHED) is "all": want one of off, depth'),
    ],
)
def test_the_whole_of_a_complaint(flag: str, complaint: str) -> None:
    with pytest.raises(SettingsError) as error:
        read_settings([flag])
    assert str(error.value) == complaint


def test_as_many_candidates_may_be_asked_for_as_have_the_same_order_in_any_company() -> None:
    assert read_settings(["--max_top_k", str(LEAST_TOP)]).max_top_k == LEAST_TOP
    with pytest.raises(SettingsError, match="max_top_k"):
        read_settings(["--max_top_k", str(LEAST_TOP + 1)])


def test_all_bad_settings_are_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"http_port.*threads"):
        read_settings(["--http_port", "x", "--threads", "x"])


def test_the_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDT_API_KEY", "open sesame")
    assert "sesame" not in repr(read_settings([]))
    with pytest.raises(SettingsError, match="api_key") as error:
        read_settings(["--api_key", ""])
    assert '""' not in str(error.value)


@pytest.mark.parametrize("key", ["geheim-ü", "two\nlines", " padded", "padded ", "\x7f"])
@pytest.mark.parametrize("name", ["api_key", "admin_key"])
def test_a_key_that_no_header_carries_is_refused(name: str, key: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name} \(RDT_{name.upper()}\): want printable ASCII") as error:
        read_settings([f"--{name}", key])
    assert key.strip() not in str(error.value)


def test_unknown_variables_are_found() -> None:
    environment = {"RDT_HTTP_PORT": "1", "RDT_HTTPPORT": "1", "rdt_host": "x", "PATH": "", "RDT_": ""}
    assert unknown_variables(environment) == ["RDT_", "RDT_HTTPPORT"]


@pytest.mark.parametrize("name", ["api_key", "admin_key"])
@pytest.mark.parametrize("value", ["None", "null", "none"])
def test_a_secret_that_a_template_did_not_find_is_a_key_all_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    by_flag = getattr(read_settings([f"--{name}", value]), name)
    assert by_flag.get_secret_value() == value
    monkeypatch.setenv(f"RDT_{name.upper()}", value)
    assert getattr(read_settings([]), name) == by_flag


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read_settings(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name}" in text
        assert field.description
        assert field.description[:30] in text


@pytest.mark.parametrize("blank", ["", "  "])
@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_blank_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, blank: str) -> None:
    """But for the one that is empty if it is not set."""
    monkeypatch.setenv(f"RDT_{name.upper()}", blank)
    if (name, blank) == ("devices", ""):
        assert read_settings([]).devices == ""
    else:
        with pytest.raises(SettingsError, match=rf"^{name} \(RDT_{name.upper()}\)"):
            read_settings([])


@pytest.mark.parametrize("name", ["api_key", "admin_key"])
def test_an_empty_key_is_no_open_door(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"RDT_{name.upper()}", "")
    with pytest.raises(SettingsError, match=rf"^{name} \(RDT_{name.upper()}\) is empty: want a key, or leave it"):
        read_settings([])


def test_bounds_of_a_tick_follow_the_device_unless_they_are_given() -> None:
    settings, given = read_settings([]), read_settings(["--token_budget=1000", "--max_live=7"])
    bounds = {device: settings.limits_on(device) for device in ("cpu", "cuda")}
    assert (bounds["cpu"].token_budget, bounds["cpu"].max_live) == (512, 64)
    assert (bounds["cuda"].token_budget, bounds["cuda"].max_live) == (16_384, 512)
    assert (given.limits_on("cuda").token_budget, given.limits_on("cuda").max_live) == (1000, 7)


def test_depth_is_shed_only_when_asked_for() -> None:
    floors = [read_settings([*flags, "--shed_min_steps=3"]).limits_on("cpu") for flags in ([], ["--shed=depth"])]
    assert [limits.shed_min_steps for limits in floors] == [None, 3]


def test_devices_have_names() -> None:
    assert read_settings(["--devices=0,2"]).device_names == ["cuda:0", "cuda:2"]
    assert read_settings(["--device=cpu"]).device_names == ["cpu"]
