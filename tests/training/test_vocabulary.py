from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from rdt_core import RDT, ModelConfig
from training.vocabulary import vocabulary_loss


def ours(model: RDT, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return vocabulary_loss(features, model.embedding.weight, model.output_bias, targets)


@pytest.fixture
def model(tiny_config: ModelConfig) -> RDT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RDT(tiny_config.with_changes(suppress_tokens=(0, 1)))
    model.decoder_bias.data.normal_()
    return model


def features_and_targets(model: RDT) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, model.config.d_model, generator=generator)
    return features.requires_grad_(), torch.randint(2, model.config.vocab_size, (40,), generator=generator)


def plain(model: RDT, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(features, model.embedding.weight, model.output_bias).float(), targets)


def gradients(loss: Callable[..., torch.Tensor], model: RDT) -> list[torch.Tensor]:
    """Of three times the loss, as a weight of the loss would have it."""
    features, targets = features_and_targets(model)
    (3 * loss(model, features, targets)).backward()  # type: ignore[no-untyped-call]
    found = [features.grad, model.embedding.weight.grad, model.decoder_bias.grad]
    model.zero_grad(set_to_none=True)
    return [gradient for gradient in found if gradient is not None]


def test_it_is_the_mean_cross_entropy_and_has_its_gradients(model: RDT) -> None:
    features, targets = features_and_targets(model)
    torch.testing.assert_close(ours(model, features, targets), plain(model, features, targets))
    for mine, theirs in zip(gradients(ours, model), gradients(plain, model), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(gradients(ours, model)[2][:2], torch.zeros(2))  # never an answer, never taught


def test_in_bfloat16_its_gradients_are_those_of_autocast(model: RDT) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = list(zip(gradients(ours, model), gradients(plain, model), strict=True))
        loss = ours(model, *features_and_targets(model))
    assert loss.dtype == torch.float32
    for mine, theirs in pairs:
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.01 * theirs.norm()


def test_without_gradients_it_is_the_same_number(model: RDT) -> None:
    features, targets = features_and_targets(model)
    with torch.no_grad():
        torch.testing.assert_close(ours(model, features, targets), plain(model, features, targets))


def test_without_rows_it_is_nothing(model: RDT) -> None:
    features, targets = features_and_targets(model)
    loss = ours(model, features[:0], targets[:0])
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0
    assert model.embedding.weight.grad is not None
    assert not model.embedding.weight.grad.any()


def test_a_token_held_impossible_costs_infinitely_much(model: RDT) -> None:
    """The trainer stops on a loss that is no number, and must not be told a comfortable one."""
    features, targets = features_and_targets(model)
    assert ours(model, features, torch.zeros_like(targets)) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_thought_impossible_costs_much_and_not_everything(dtype: torch.dtype) -> None:
    features = torch.tensor([[200.0, 0.0], [0.0, 1.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = vocabulary_loss(features, weight, torch.zeros(2), torch.tensor([1, 1]))
    assert 40 < loss < 45
    loss.backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None
    assert features.grad[0].tolist() == pytest.approx([0.5, -0.5])
