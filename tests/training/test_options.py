"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from training import compare, evaluate, release, scorer
from training.train import main as train

PATHS = {
    train: ["--config", "--override", "--checkpoint"],
    evaluate.main: ["--checkpoint", "--scorer", "--output", "--cache-dir"],
    release.main: ["--checkpoint", "--output"],
    compare.main: ["--plot"],
    scorer.main: ["--output", "--init-from", "--cache-dir"],
}


@pytest.mark.parametrize(("main", "option"), [(main, option) for main, options in PATHS.items() for option in options])
def test_a_blank_path_is_not_the_current_folder(
    main: Callable[[list[str]], int], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for blank in ("", " "):
        with pytest.raises(SystemExit, match="2"):
            main([option, blank])
        assert f"argument {option}: no name: want a path\n" in capsys.readouterr().err
