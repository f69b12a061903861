"""The weights that come with the repository."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from rdt_core import LoadedModel, Packing, checkpoint, masking, restore

BUNDLED = Path(__file__).parents[2] / "models" / "rdt-small" / "best_model.pt"
MAX_BYTES = 40_000_000
TEXTS = (
    "The river rises in the hills to the north of the town and flows into the sea near the old harbour .",
    "In the second half of the season the team won seven of its games and finished in third place .",
    "The album was recorded in the summer of the following year and released to positive reviews .",
    "She was born in London , where her father worked as a teacher , and studied at the University of Oxford .",
    "The church was built in the twelfth century , and the tower was added two hundred years later .",
    "The ship was armed with four guns and had a crew of more than three hundred officers and men .",
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def bundled() -> LoadedModel:
    return checkpoint.load(BUNDLED)


def as_values(section: Any) -> list[Any]:
    return list(section.values()) if isinstance(section, dict) else [section]


def masked_text(bundled: LoadedModel, text: str, ratio: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens as they are, tokens with masks, and which rows those are."""
    tokens = torch.tensor(bundled.tokenizer.encode(text).ids)
    maskable = masking.maskable_rows(tokens, bundled.tokenizer.special_ids)
    masked = masking.masked_at(masking.mask_ranks(maskable, torch.Generator().manual_seed(0)), ratio)
    return tokens, masking.corrupt(tokens, masked, bundled.tokenizer.mask_id), masked


def test_it_is_small_enough_for_a_repository_and_says_nothing_of_where_it_was_made() -> None:
    assert BUNDLED.stat().st_size <= MAX_BYTES
    contents = checkpoint.read(BUNDLED)
    assert contents.optimizer_state_dict is None
    names = [str(value) for section in contents.config["training"].values() for value in as_values(section)]
    assert not [name for name in names for part in name.split(",") if Path(part).is_absolute()]
    assert any(name.startswith("wikitext2-train") for name in names)


def test_the_hidden_state_stays_bounded_for_64_passes(bundled: LoadedModel) -> None:
    _, tokens, masked = masked_text(bundled, " ".join(TEXTS), 0.5)
    packing = Packing.of([len(tokens)])
    state = bundled.model.begin(tokens, masked, packing)
    norms = []
    for _ in range(64):
        state = bundled.model(state, packing)
        norms.append(state.hidden.norm(dim=-1).mean().item())
    assert max(norms) < 2 * norms[0], norms


def test_it_restores_far_more_than_the_most_frequent_word_would(bundled: LoadedModel) -> None:
    hits = masks = 0
    for text in TEXTS:
        tokens, corrupted, masked = masked_text(bundled, text, 0.15)
        restored = torch.tensor(restore(bundled.model, corrupted, masked).tokens)
        hits += int((restored == tokens)[masked].sum())
        masks += int(masked.sum())
    assert hits / masks > 0.2, f"{hits} of {masks}"


def test_many_passes_say_what_few_say(bundled: LoadedModel) -> None:
    same = rows = 0
    for text in TEXTS:
        _, corrupted, masked = masked_text(bundled, text, 0.3)
        few, many = (restore(bundled.model, corrupted, masked, max_steps=n, threshold=0.0) for n in (4, 16))
        same += sum(a == b for a, b in zip(few.tokens, many.tokens, strict=True)) - int((~masked).sum())
        rows += len(few.rows)
    assert same / rows > 0.9, f"{same} of {rows}"


def test_the_gate_takes_more_passes_the_stricter_it_is_and_not_the_same_for_every_text(bundled: LoadedModel) -> None:
    def steps(threshold: float) -> list[int]:
        texts = [masked_text(bundled, text, ratio)[1:] for text in TEXTS for ratio in (0.1, 0.5, 0.9)]
        return [restore(bundled.model, *text, max_steps=20, threshold=threshold).steps for text in texts]

    lax, usual, strict = steps(0.2), steps(0.1), steps(0.03)
    assert statistics.mean(lax) < statistics.mean(usual) < statistics.mean(strict) < 20
    assert len(set(usual)) > 1
