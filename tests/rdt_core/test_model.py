from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdt_core import PRESETS, RDT, ModelConfig, Packing, State, unpack
from rdt_core.gate import Gate, GateState
from rdt_core.packing import rows_of
from tests.rdt_core.conftest import Build
from tests.rdt_core.sequences import random_sequences

quick = settings(max_examples=25)
VARIANTS = {
    "linear": {},
    "prelude": {"n_prelude_layers": 2},
    "transformer": {"decoder_type": "transformer", "n_decoder_layers": 2, "gate_shortlist": 0},
    "one coda layer": {"decoder_type": "transformer", "n_decoder_layers": 1, "gate_shortlist": 0},
    "conditioned": {"level_conditioning": True},
    "no shortlist": {"gate_shortlist": 0},
    "as BERT": {"norm": "post", "positions": "learned", "decoder_type": "dense", "n_prelude_layers": 1},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def sequence_of(state: State, packing: Packing, index: int) -> State:
    """The state of one sequence, alone."""
    rows = rows_of(packing, [index])
    gate = GateState(state.gate.level[[index]], state.gate.summary[[index]])
    return State(state.hidden[rows], state.embedded[rows], state.masked[rows], gate)


def joined(states: list[State]) -> State:
    """States of several packings as one, whatever their depths."""
    gate = GateState(*(torch.cat(parts) for parts in zip(*(state.gate for state in states), strict=True)))
    plain = (torch.cat(parts) for parts in zip(*(state[:3] for state in states), strict=True))
    return State(*plain, gate)


def perturb(model: RDT) -> RDT:
    """Every parameter a little off its start, so that nothing is a no-op."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@variants
def test_company_does_not_change_the_answer(build: Build, changes: dict[str, object]) -> None:
    model = perturb(build(**changes)).eval()
    lengths, depths = [5, 9, 1, 5], [0, 1, 3, 7]
    tokens, masked, packing = random_sequences(lengths)
    alone = []
    for index, depth in enumerate(depths):
        rows, own = rows_of(packing, [index]), Packing.of([lengths[index]])
        state = model.begin(tokens[rows], masked[rows], own)
        for _ in range(depth):
            state = model(state, own)
        alone.append(state)
    together = model(joined(alone), packing)
    logits = unpack(model.decode(together.hidden, packing), packing)
    for index, state in enumerate(alone):
        own = Packing.of([lengths[index]])
        expected, found = model(state, own), sequence_of(together, packing, index)
        torch.testing.assert_close(found.hidden, expected.hidden, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.gate, expected.gate, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits[index], model.decode(expected.hidden, own), atol=1e-5, rtol=0)


def hidden_norms(model: RDT, n_passes: int) -> list[float]:
    """Mean norm of a hidden row after each pass."""
    tokens, masked, packing = random_sequences([12, 20])
    with torch.no_grad():
        states = model.eval().recursive_forward(tokens, masked, packing, n_passes)
    return [float(state.hidden.norm(dim=-1).mean()) for state in states]


@pytest.mark.parametrize("n_training_steps", [0, 8])
def test_the_hidden_state_stays_bounded_over_64_passes(n_training_steps: int) -> None:
    torch.manual_seed(0)
    model = RDT(PRESETS["small"].with_changes(vocab_size=60))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(n_training_steps):
        tokens, masked, packing = random_sequences([12, 12], seed=step)
        state = model.recursive_forward(tokens.masked_fill(masked, 4), masked, packing, n_passes=3)[-1]
        F.cross_entropy(model.decode(state.hidden, packing)[masked], tokens[masked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    norms = hidden_norms(model, 64)
    assert max(norms) < 2 * norms[1], f"norms grow: {[round(norm, 1) for norm in norms]}"
    assert min(norms) > 0.5 * norms[1], f"norms vanish: {[round(norm, 1) for norm in norms]}"


@variants
def test_decoding_some_rows_is_decoding_all_and_selecting(build: Build, changes: dict[str, object]) -> None:
    model = build(**changes).eval()
    tokens, masked, packing = random_sequences([4, 7])
    hidden = model(model.begin(tokens, masked, packing), packing).hidden
    rows = torch.tensor([8, 0, 3])
    everything = model.decode(hidden, packing)
    assert everything.shape == (11, model.config.vocab_size)
    torch.testing.assert_close(model.decode(hidden, packing, rows), everything[rows])


@variants
def test_rows_that_will_be_read_come_out_alone_as_among_all(build: Build, changes: dict[str, object]) -> None:
    model = perturb(build(n_encoder_layers=2, **changes)).eval()
    tokens, masked, packing = random_sequences([4, 7, 5])
    state = model(model.begin(tokens, masked, packing), packing)
    rows = (masked | (packing.sequence_ids == 1)).nonzero().squeeze(1)  # the second one goes on
    everything, some = model(state, packing), model(state, packing, rows)
    torch.testing.assert_close(some.hidden[rows], everything.hidden[rows])
    torch.testing.assert_close(some.gate, everything.gate)
    read_by_nobody = torch.ones(16, dtype=torch.bool).index_fill(0, rows, False)
    assert read_by_nobody.any()
    if not model.decoder:
        assert not some.hidden[read_by_nobody].any()


@variants
def test_gradients_are_the_same_when_only_rows_that_are_read_come_out(build: Build, changes: dict[str, object]) -> None:
    tokens, masked, packing = random_sequences([4, 7])
    rows = masked.nonzero().squeeze(1)

    def slopes(read: Tensor | None) -> dict[str, Tensor]:
        model = perturb(build(dropout=0.0, **changes))
        states = model.recursive_forward(tokens, masked, packing, 3, 2, rows=read)
        loss = sum(model.decode(state.hidden, packing, rows).logsumexp(-1).mean() for state in states[1:])
        (loss + states[-1].gate.level.sum()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    torch.testing.assert_close(slopes(rows), slopes(None))


def test_rows_that_will_be_read_may_be_none_at_all(build: Build) -> None:
    model = build().eval()
    tokens, masked, packing = random_sequences([4, 7])
    state = model.begin(tokens, torch.zeros_like(masked), packing)
    after = model(state, packing, torch.tensor([], dtype=torch.int64))
    assert not after.hidden.any()
    assert after.gate.level.tolist() == [0, 0]


def test_learned_positions_tell_places_apart_and_end(build: Build) -> None:
    model = build(norm="post", positions="learned", max_seq_len=9).eval()
    packing = Packing.of([9, 4])
    tokens, masked = torch.full((13,), 7), torch.ones(13, dtype=torch.bool)
    hidden = model(model.begin(tokens, masked, packing), packing).hidden
    assert torch.cdist(hidden[:9], hidden[:9]).fill_diagonal_(1).min() > 1e-3
    state = model.begin(tokens, masked, packing)
    assert torch.equal(state.hidden[:4], state.hidden[9:])
    assert torch.equal(state.embedded, model.embed(tokens))
    with pytest.raises(ValueError, match=r"^a sequence has 10 tokens: want 1 to 9$"):
        model.begin(tokens, masked, Packing.of([10, 3]))


def test_post_norms_are_the_last_thing_a_pass_does(build: Build) -> None:
    model = perturb(build(norm="post")).eval()
    tokens, masked, packing = random_sequences([6])
    hidden = model(model.begin(tokens, masked, packing), packing).hidden
    norm = model.encoder[-1].feed_forward_norm.norm
    normed = (hidden - norm.bias) / norm.weight
    torch.testing.assert_close(normed.mean(-1), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(normed.std(-1, unbiased=False), torch.ones(6), atol=1e-3, rtol=0)


def test_the_linear_decoder_is_tied_to_the_embedding(build: Build) -> None:
    model = build(suppress_tokens=())
    torch.nn.init.normal_(model.decoder_bias)
    hidden = torch.randn(3, 16)
    expected = F.layer_norm(hidden, (16,)) @ model.embedding.weight.T + model.decoder_bias
    torch.testing.assert_close(model.decode(hidden, Packing.of([3])), expected)


def test_suppressed_tokens_are_never_predicted_and_leave_gradients_finite(build: Build) -> None:
    model = build(suppress_tokens=(0, 7))
    model.decoder_bias.data[[0, 7]] = 1e4
    tokens, masked, packing = random_sequences([12])
    state = model(model.begin(tokens, masked, packing), packing)
    logits = model.decode(state.hidden, packing)
    assert not logits.softmax(-1)[:, [0, 7]].any()
    F.cross_entropy(logits, torch.full((12,), 9)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.decoder_bias.grad is not None
    assert not model.decoder_bias.grad[[0, 7]].any()


def grads(model: RDT) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the gate, and of everything else."""
    gate = [p.grad for name, p in model.named_parameters() if name.startswith("gate.") and p.grad is not None]
    trunk = [p.grad for name, p in model.named_parameters() if not name.startswith("gate.") and p.grad is not None]
    return gate, trunk


@variants
def test_the_gate_loss_never_moves_the_trunk(build: Build, changes: dict[str, object]) -> None:
    model = build(**changes)
    tokens, masked, packing = random_sequences([6, 4])
    rows = masked.nonzero().squeeze(1)
    states = model.recursive_forward(tokens, masked, packing, n_passes=3, n_grad_passes=3)
    token_levels = [model.token_level(state.hidden, packing, rows) for state in states]
    sum(state.gate.level.sum() + level.sum() for state, level in zip(states, token_levels, strict=True)).backward()
    gate, trunk = grads(model)
    assert len(gate) == len(list(model.gate.parameters()))
    assert not trunk


def test_the_reconstruction_loss_never_moves_the_gate(build: Build) -> None:
    model = perturb(build(level_conditioning=True))
    states = model.recursive_forward(*random_sequences([6, 4]), n_passes=3, n_grad_passes=3)
    states[-1].hidden.square().sum().backward()
    gate, trunk = grads(model)
    assert trunk
    assert not gate


@quick
@given(st.integers(0, 10_000), st.floats(0, 100))
def test_the_level_never_rises(build: Build, seed: int, scale: float) -> None:
    model = build(seed).eval()
    for parameter in model.gate.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(seed)).mul_(scale)
    tokens, masked, packing = random_sequences([3, 6], seed)
    state = model.begin(tokens, masked, packing)
    with torch.no_grad():
        for _ in range(6):
            last, state = state, model(state, packing)
            assert (state.gate.level <= last.gate.level).all()
            assert ((state.gate.level >= 0) & (state.gate.level <= 1)).all()


@pytest.mark.parametrize("gate_shortlist", [0, 1, 7])
@quick
@given(st.integers(0, 10_000), st.floats(0, 100))
def test_a_token_level_is_a_share(build: Build, gate_shortlist: int, seed: int, scale: float) -> None:
    model = build(seed, gate_shortlist=gate_shortlist).eval()
    for parameter in model.gate.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(seed)).mul_(scale)
    tokens, masked, packing = random_sequences([3, 6], seed)
    with torch.no_grad():
        state = model(model.begin(tokens, masked, packing), packing)
        level = model.token_level(state.hidden, packing, torch.arange(9))
    assert level.shape == (9,)
    assert ((level >= 0) & (level <= 1)).all()


@torch.no_grad()
def test_a_shortlist_of_all_tokens_leaves_nothing_to_estimate(build: Build) -> None:
    suppressed = (0, 3)
    model = perturb(build(suppress_tokens=suppressed, gate_shortlist=0)).eval()
    n_answers = model.config.vocab_size - len(suppressed)
    knowing = build(suppress_tokens=suppressed, gate_shortlist=n_answers).eval()
    knowing.load_state_dict({k: v for k, v in model.state_dict().items() if "token." not in k}, strict=False)
    knowing.gate.token.weight.zero_()
    knowing.gate.token.bias.copy_(torch.tensor([0.0, -60.0]))  # next to nothing is left to the others
    tokens, masked, packing = random_sequences([3, 6])
    state = knowing(knowing.begin(tokens, masked, packing), packing)
    rows = torch.tensor([1, 4, 8])
    doubt = 1 - knowing.decode(state.hidden, packing, rows).softmax(-1).amax(1)
    torch.testing.assert_close(knowing.token_level(state.hidden, packing, rows), doubt)


@torch.no_grad()
def test_the_shortlist_are_the_tokens_of_the_largest_bias(build: Build) -> None:
    model = build(suppress_tokens=(4,), gate_shortlist=3)
    model.decoder_bias.copy_(torch.arange(len(model.decoder_bias)).float())
    model.decoder_bias[4] = 1000.0  # never an answer, so never on it
    weight, bias = model.shortlist
    last = len(model.decoder_bias) - 1
    assert bias.tolist() == [last, last - 1, last - 2]
    assert torch.equal(weight, model.embedding.weight[[last, last - 1, last - 2]])


@torch.no_grad()
def test_without_a_shortlist_the_token_level_is_the_limit_of_an_empty_one(build: Build) -> None:
    plain = perturb(build(gate_hidden_dim=4, gate_shortlist=0))
    empty = Gate(plain.config.d_model, 4, n_others=7)
    empty.load_state_dict({k: v for k, v in plain.gate.state_dict().items() if "token." not in k}, strict=False)
    empty.token.weight.copy_(torch.cat((plain.gate.token.weight, torch.randn(1, 4))))
    empty.token.bias.copy_(torch.cat((plain.gate.token.bias, torch.ones(1))))
    hidden = torch.randn(5, plain.config.d_model)
    nothing = torch.full((5, 1), -torch.inf)
    torch.testing.assert_close(empty.token_level(hidden, nothing), plain.gate.token_level(hidden, None))


def test_a_sequence_without_masks_has_level_zero(build: Build) -> None:
    model = build().eval()
    tokens, masked, packing = random_sequences([3, 6])
    state = model(model.begin(tokens, masked.index_fill(0, torch.arange(3), False), packing), packing)
    assert state.gate.level[0] == 0
    assert state.gate.level[1] > 0


def test_gradients_flow_through_the_last_passes_only(build: Build) -> None:
    states = build(n_prelude_layers=1).recursive_forward(*random_sequences([6]), n_passes=5, n_grad_passes=2)
    assert [state.hidden.requires_grad for state in states] == [False, False, False, True, True]


def test_every_matrix_of_the_encoder_gets_a_gradient_in_bfloat16(build: Build) -> None:
    """With torch 2.10 none did that the first passes had used."""
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        state = model.recursive_forward(*random_sequences([6]), n_passes=4, n_grad_passes=2)[-1]
    state.hidden.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def test_recursive_forward_is_forward_again_and_again(build: Build) -> None:
    model = build().eval()
    tokens, masked, packing = random_sequences([6, 3])
    states = model.recursive_forward(tokens, masked, packing, n_passes=3)
    state = model.begin(tokens, masked, packing)
    for expected in states:
        state = model(state, packing)
        assert torch.equal(state.hidden, expected.hidden)
        assert torch.equal(state.gate.level, expected.gate.level)


def test_recursive_forward_respects_no_grad(build: Build) -> None:
    with torch.no_grad():
        states = build().recursive_forward(*random_sequences([6]), n_passes=2)
    assert not any(state.hidden.requires_grad for state in states)


@pytest.mark.parametrize(("n_passes", "n_grad_passes"), [(0, 1), (1, 0)])
def test_recursive_forward_wants_at_least_one_pass(build: Build, n_passes: int, n_grad_passes: int) -> None:
    with pytest.raises(ValueError, match=f"n_passes is {n_passes}, n_grad_passes is {n_grad_passes}"):
        build().recursive_forward(*random_sequences([6]), n_passes, n_grad_passes)
    assert len(build().recursive_forward(*random_sequences([6]), 1, 1)) == 1


def test_the_embedded_input_is_fed_back_at_every_pass(build: Build) -> None:
    model = build().eval()
    tokens, masked, packing = random_sequences([6])
    state = model(model.begin(tokens, masked, packing), packing)
    other = state._replace(embedded=model.embed(torch.full((6,), 9)))
    assert not torch.allclose(model(state, packing).hidden, model(other, packing).hidden, atol=1e-2)


def test_settle_changes_only_the_rows_it_names(build: Build) -> None:
    model = build().eval()
    tokens, masked, packing = random_sequences([8])
    before = model(model.begin(tokens, masked.fill_(True), packing), packing)
    rows, answers = torch.tensor([6, 1]), torch.tensor([11, 12])
    after = model.settle(before, rows, answers)
    others = torch.tensor([0, 2, 3, 4, 5, 7])
    assert torch.equal(after.embedded[rows], model.embed(answers))
    assert torch.equal(after.embedded[others], before.embedded[others])
    assert after.masked.nonzero().squeeze(1).tolist() == others.tolist()
    assert torch.equal(after.hidden, before.hidden)
    assert after.gate is before.gate
    assert before.masked.all()


def test_a_prelude_runs_once_before_the_first_pass(build: Build) -> None:
    tokens, masked, packing = random_sequences([6])
    state = build(n_prelude_layers=1).eval().begin(tokens, masked, packing)
    assert not torch.allclose(state.hidden, state.embedded, atol=1e-2)
    plain = build().eval().begin(tokens, masked, packing)
    assert torch.equal(plain.hidden, plain.embedded)


def test_decoder_layers_belong_to_the_transformer_decoder_only(build: Build) -> None:
    assert len(build(n_decoder_layers=2).decoder) == 0
    assert len(build(n_decoder_layers=2, decoder_type="transformer", gate_shortlist=0).decoder) == 2


def test_a_model_is_made_from_a_config_or_from_names_but_not_both(tiny_config: ModelConfig) -> None:
    assert RDT(**tiny_config.to_mapping()).config == RDT(tiny_config).config
    with pytest.raises(TypeError, match="not both"):
        RDT(tiny_config, d_model=32)
    with pytest.raises(ValueError, match="n_layers is not a model setting"):
        RDT(n_layers=3)


def test_fresh_weights_keep_the_scale_of_what_they_are_given(build: Build) -> None:
    """And residual branches halve it."""
    model = build(d_model=64, d_ff=128, gate_hidden_dim=64, positions="learned")
    scales = {"embedding": 1 / 8, "position_embedding": 0.1, "gate.mix": 129**-0.5}
    scales |= {f"encoder.0.{name}": 1 / 8 for name in ("attention.qkv", "feed_forward.up")}
    scales |= {"encoder.0.attention.out": 1 / 16, "encoder.0.feed_forward.down": 128**-0.5 / 2}
    for name, scale in scales.items():
        assert model.get_submodule(name).weight.std().item() == pytest.approx(scale, rel=0.1), name
    assert torch.equal(model.inject.weight, torch.eye(64))
    assert not any(tensor.any() for name, tensor in model.named_parameters() if name.endswith("bias"))


def test_a_model_on_the_meta_device_takes_weights_by_assignment(build: Build) -> None:
    real = build(level_conditioning=True, n_prelude_layers=1).eval()
    with torch.device("meta"):
        empty = RDT(real.config).eval()
    assert empty.device.type == "meta"
    empty.load_state_dict(real.state_dict(), assign=True)
    tokens, masked, packing = random_sequences([6])
    one, other = (model(model.begin(tokens, masked, packing), packing) for model in (real, empty))
    assert torch.equal(one.hidden, other.hidden)
