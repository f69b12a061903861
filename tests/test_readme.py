"""What the README says is run, and what it shows is what comes out."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import Client
from tests.e2e.test_server import Server, server, wait_until_ready

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.e2e


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def command(start: str) -> list[str]:
    """The one command of the README that starts so, with the environment this test runs in."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith(start)]
    assert len(lines) == 1, f"{len(lines)} commands start with {start!r}"
    first, *rest = shlex.split(lines[0])
    return [first.replace(".venv/bin", str(BIN)), *rest]


def run(arguments: list[str], directory: Path = ROOT) -> str:
    done = subprocess.run(arguments, cwd=directory, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_times(answer: str) -> dict[str, object]:
    return {name: value for name, value in json.loads(answer).items() if name != "timing_ms"}


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE)
    assert targets == ["serve", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("server") / "log") as running, wait_until_ready(running):
        yield running


def test_the_server_answers_the_curl_command_as_shown(running: Server) -> None:
    curl = [part.replace("localhost:8000", running.url.removeprefix("http://")) for part in command("curl")]
    answer = without_times(run(curl))
    (shown,) = blocks("json")
    expected = without_times(shown)
    probabilities = [[word.pop("probability") for word in a["restored"]] for a in (answer, expected)]  # type: ignore
    levels = [a.pop("level") for a in (answer, expected)]
    assert answer == expected
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-3)
    assert levels[0] == pytest.approx(levels[1], abs=1e-3)


def test_the_command_line_prints_what_is_shown() -> None:
    (shown, _tree) = blocks("text")
    assert run(command(".venv/bin/rdt-denoise")) == shown


def test_settling_fills_the_gaps_of_the_example_as_it_says(running: Server) -> None:
    prose = " ".join(README.split())
    (options, text, becomes), *others = re.findall(r'with `(.{,60}?)` "([^"]*\[MASK\][^"]*)" becomes "([^"]*)"', prose)
    assert not others
    with Client(running.url) as client:
        assert client.denoise(text, **json.loads(f"{{{options}}}")).text == becomes
        assert f'after two passes, it is "{client.denoise(text).text}"' in prose


def test_the_python_examples_run(running: Server) -> None:
    client, rpc, alone = blocks("python")
    served = run([sys.executable, "-c", client.replace("http://127.0.0.1:8000", running.url)]).splitlines()
    (grpc_address,) = re.findall(r"listening on grpc://(\S+)", running.log.read_text())
    called = run([sys.executable, "-c", rpc.replace("127.0.0.1:50051", grpc_address)])
    assert called == "The king of england was killed in the battle of Hastings . 2\n"
    assert re.fullmatch(r"The album was \w+ in 2004 and received positive \w+ from critics\. 2", served[0])
    assert len(served) == 4, "an answer, two passes, and the answer again"
    assert re.fullmatch(
        r"The album was \w+ in 2004 .* from critics\. 2 \[\d\.\d+, \d\.\d+\]\n", run([sys.executable, "-c", alone])
    )


def test_the_training_commands_train_evaluate_and_release(tmp_path: Path) -> None:
    lines = ["The quick brown fox jumps over the lazy dog near the river bank , and sleeps .\n"] * 200
    for name in ("text.txt", "other.txt"):
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    tokenizer = f"data.tokenizer_name={ROOT / 'models/rdt-small/best_model.pt'}"
    train = [
        part.replace("training/configs", str(ROOT / "training/configs"))
        for part in command(".venv/bin/python -m training ")
    ]
    run([*train, tokenizer, "training.num_steps=2", "data.max_seq_length=32", "output.eval_batches=1"], tmp_path)
    short = ["--segments", "2", "--length", "32", "--mask-ratios", "0.2", "--max-depth", "2", "--settle-passes", "2"]
    table = run([*command(".venv/bin/python -m training.evaluate"), *short], tmp_path)
    assert table.startswith("exact match")
    assert run(command(".venv/bin/python -m training.release"), tmp_path).startswith("runs/tiny/release.pt: rdt-tiny@")
    assert command(".venv/bin/rdt-serve")[1:] == ["--checkpoint", "runs/tiny/release.pt"]
