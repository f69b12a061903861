from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest.mock import Mock

import pytest

from service import cli, commands
from service.cli import denoise, serve
from service.process import logs

OUTPUT = re.compile(r"Input: (.*)\nOutput: (.*)\nSteps: (\d+)/(\d+)\n")


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> list[str]:
    return ["--checkpoint", str(tiny_checkpoint), "--device", "cpu"]


def test_one_text(checkpoint: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = "The Quick  [MASK] fox"
    assert denoise([*checkpoint, "--text", text, "--max-steps", "3", "--threshold", "0"]) == 0
    printed = capsys.readouterr()
    match = OUTPUT.fullmatch(printed.out)
    assert match is not None
    assert match.groups()[0] == text
    assert match.groups()[2:] == ("3", "3")
    assert re.fullmatch(r"The Quick  \S+ fox", match[2])
    assert "[MASK]" not in match[2]
    assert printed.err == ""


def test_defaults_are_the_checkpoints(checkpoint: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert denoise([*checkpoint, "--text", "[MASK]"]) == 0
    assert "/8\n" in capsys.readouterr().out


@pytest.mark.parametrize(("halting", "steps"), [("gate", "6"), ("settle", "1")])
def test_halting_is_passed_on(
    checkpoint: list[str], halting: str, steps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With nothing masked, settling is done after one pass, and a gate at threshold 0 never is."""
    options = ["--text", "fox", "--max_steps", "6", "--threshold", "0", "--halting", halting]
    assert denoise([*checkpoint, *options]) == 0
    assert OUTPUT.findall(capsys.readouterr().out)[0][2] == steps


def test_a_file_line_by_line(checkpoint: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("the [MASK]\n\n  \nfox [MASK]\n", encoding="utf-8")
    assert denoise([*checkpoint, "--file", str(file)]) == 0
    assert [found[0] for found in OUTPUT.findall(capsys.readouterr().out)] == ["the [MASK]", "fox [MASK]"]


def test_bad_lines_of_a_file_are_named_and_the_others_restored(
    checkpoint: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.txt"
    text = "\ufeffthe\u2028[MASK]\n\n" + "a " * 40 + "\nfox\f[MASK]\n\u200b\n"
    file.write_bytes(text.encode() + b"caf\xe9 [MASK]\n")
    assert denoise([*checkpoint, "--file", str(file)]) == 2
    printed = capsys.readouterr()
    assert [found[0] for found in OUTPUT.findall(printed.out)] == ["the\u2028[MASK]", "fox\f[MASK]"]
    problems = printed.err.splitlines()
    assert [line.partition(": text ")[0] for line in problems] == [
        f"rdt-denoise: {file}:{number}" for number in (3, 5, 6)
    ]
    assert problems[2].endswith(":6: text has the byte 0xe9 at character 4, which cannot be decoded")


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", b"Input: caf\\xe9 \\u0151 fox\n"), ("latin-1", b"Input: caf\xe9 \\u0151 fox\n")]
)
def test_characters_that_cannot_be_printed_are_escaped(
    checkpoint: list[str], encoding: str, printed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(bytes_out, encoding=encoding))
    assert denoise([*checkpoint, "--text", "café ő fox"]) == 0
    assert bytes_out.getvalue().startswith(printed)


def test_a_reader_who_has_seen_enough_is_no_error(
    checkpoint: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert denoise([*checkpoint, "--text", "the [MASK]"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("source", [["--text", "the [MASK]"], ["--interactive"]])
def test_ctrl_c_ends_it_without_a_traceback(
    checkpoint: list[str], source: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the [MASK]\n"))
    monkeypatch.setattr("service.local.run_reference", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr("sys.argv", ["rdt-denoise", *checkpoint, *source])
    assert commands.denoise() == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("ending", ["exit\nthe [MASK]\n", ""])
def test_interactive_reads_until_it_is_told_to_end(
    checkpoint: list[str], ending: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the [MASK]\n\n\u200b\nfox [MASK]\n" + ending))
    assert denoise([*checkpoint, "--interactive"]) == 0
    printed = capsys.readouterr()
    assert [found[0] for found in OUTPUT.findall(printed.out)] == ["the [MASK]", "fox [MASK]"]
    assert printed.err.count("\n") == 1, "the bad line is named, and the session goes on"


def test_nobody_types_where_there_is_no_input(
    checkpoint: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rdt-denoise --interactive <&-`"""
    monkeypatch.setattr("sys.stdin", None)
    assert denoise([*checkpoint, "--interactive"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_typed_line_that_is_no_text_is_left_out(
    checkpoint: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = io.BytesIO(b"the [MASK]\nbad \xff\nfox [MASK]\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding="utf-8", errors="strict"))
    assert denoise([*checkpoint, "--interactive"]) == 0
    printed = capsys.readouterr()
    assert [found[0] for found in OUTPUT.findall(printed.out)] == ["the [MASK]", "fox [MASK]"]
    assert printed.err == "rdt-denoise: line 2: text has the byte 0xff at character 5, which cannot be decoded\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", ""], "text"),
        (["--text", "a " * 40], "42 tokens"),
        (["--text", "a\udcff"], "text has the byte 0xff at character 2"),
        (["--text", "a\ud800"], "surrogates"),
        (["--text", "a", "--max_steps", "0"], "max_steps is 0"),
        (["--text", "a", "--max_steps", "x"], "max_steps"),
        (["--text", "a", "--threshold", "nan"], "threshold is NaN"),
        (["--text", "a", "--threshold", "-1"], "threshold is -1.0"),
        (["--text", "a", "--halting", "never"], "halting"),
        (["--text", "a", "--device", "tpu"], "device is tpu"),
        (["--text", "a", "--checkpoint", ""], "argument --checkpoint: no name"),
        (["--text", "a", "--checkpoint", "  "], "argument --checkpoint: no name"),
        (["--file", ""], "argument --file: no name"),
        (["--file", "  "], "argument --file: no name"),
        (["--file", "/nowhere/texts.txt"], "/nowhere/texts.txt"),
        (["--text", "a", "--file", "b"], "not allowed with"),
        ([], "--interactive"),
        (["--nonsense"], ""),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    checkpoint: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = denoise([*checkpoint, *options])
    except SystemExit as end:  # argparse
        status = end.code  # type: ignore[assignment] # an int here
    assert status == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"rdt-denoise: [^\n]+\n", printed.err)
    assert message in printed.err


def test_a_file_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(b"not a checkpoint")
    assert denoise(["--checkpoint", str(file), "--text", "a"]) == 2
    assert str(file) in capsys.readouterr().err


def test_serve_names_bad_settings_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(["--http_port", "-5"]) == 2
    assert re.fullmatch(r"rdt-serve: http_port [^\n]+\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),
        ("a.host", None, True),
        ("0.0.0.0", "s3cret", False),
    ],
)
def test_serve_warns_whoever_listens_beyond_loopback_without_a_key(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, host: str, key: str | None, warns: bool
) -> None:
    monkeypatch.setattr(cli, "_serve", lambda _: 0)
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    monkeypatch.delenv("RDT_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("RDT_API_KEY", key)
    assert serve(["--host", host]) == 0
    assert ("without RDT_API_KEY" in caplog.text) is warns


def test_standard_streams_that_are_closed_change_no_status(tmp_path: Path) -> None:
    """Their numbers would go to what the event loop opens, and libuv aborts rather than close those."""
    command = [sys.executable, "-m", "service", "--checkpoint", str(tmp_path / "missing"), "--http_port=0"]
    started = ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", *command, "--grpc_port=0"]
    assert subprocess.run(started, timeout=60, check=False).returncode == 1


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_children_inherit_what_stands_in_for_closed_streams(closed: str) -> None:
    script = """
        import os, subprocess, sys
        from service import cli
        cli.open_standard_streams()
        look = "import os; [os.fstat(number) for number in range(3)]"
        sys.exit(subprocess.call([sys.executable, "-c", look]))
    """
    started = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run(started, timeout=60, check=False).returncode == 0


class Limits:
    """Stands in for the module `resource`."""

    RLIMIT_NOFILE, RLIM_INFINITY = 7, -1

    def __init__(self, soft: int, hard: int, most: int = 2**40) -> None:
        self.limits, self._most = (soft, hard), most

    def getrlimit(self, which: int) -> tuple[int, int]:
        assert which == self.RLIMIT_NOFILE
        return self.limits

    def setrlimit(self, which: int, limits: tuple[int, int]) -> None:
        assert which == self.RLIMIT_NOFILE
        if limits[0] > self._most:
            raise ValueError("current limit exceeds maximum limit")
        self.limits = limits


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1024, 524_288), 16_384), ((1024, 4096), 4096), ((1024, -1), 16_384), ((16_384, 16_384), 16_384),
        ((100_000, 524_288), 100_000), ((-1, -1), -1),
    ],
)  # fmt: skip
def test_files_are_allowed_for_many_connections(
    before: tuple[int, int], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(*before)
    monkeypatch.setattr(cli, "resource", limits)
    cli.lift_limit_of_files()
    assert limits.limits == (after, before[1])


def test_where_files_cannot_be_limited_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(256, -1, most=10_240)
    monkeypatch.setattr(cli, "resource", limits)
    cli.lift_limit_of_files()
    assert limits.limits == (256, -1)
    monkeypatch.setattr(cli, "resource", None)
    cli.lift_limit_of_files()


def test_a_message_that_cannot_be_written_changes_no_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error on a full disk, or a pipe that nobody reads."""
    monkeypatch.setattr(sys, "stderr", Mock(write=Mock(side_effect=OSError)))
    assert serve(["--http_port", "x"]) == 2
