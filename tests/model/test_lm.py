"""The language model around the mixers: initialisation, logits, losses, counts, recomputation."""

import math

import pytest
import torch
from models import MODELS, config, model, noise, tokens

from nanochat.errors import UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.layers import Linear
from nanochat.model.lm import LM

close = torch.testing.assert_close


# ---- initialisation


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_initialised_and_seeds_decide(name: str) -> None:
    a, b, c = (LM.build(config(**MODELS[name]), seed=seed) for seed in (1, 1, 2))
    assert all(torch.isfinite(p).all() for p in a.parameters())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in a.parameters())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed.weight, c.embed.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lm: lm.embed.weight.mul_(2), "embed.weight was initialised 2 times"),
        (lambda lm: None, "stream_scale was initialised 0 times"),
    ],
    ids=["twice", "never"],
)
def test_a_parameter_written_twice_or_never_is_caught(
    change: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LM.init_weights

    def broken(lm: LM) -> None:
        if "2 times" in said:
            original(lm)
        with torch.no_grad():
            change(lm)  # type: ignore[operator]

    monkeypatch.setattr(LM, "init_weights", broken)
    with pytest.raises(AssertionError, match=said):
        LM.build(config(pattern="T"))


def test_a_parameter_written_in_part_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear, "init_zero", lambda self: self.weight[:1].zero_())
    with pytest.raises(AssertionError, match="was not initialised whole"):
        LM.build(config(pattern="T"))


@pytest.mark.parametrize("name", MODELS)
def test_a_new_model_predicts_nothing_yet(name: str) -> None:
    lm, ids = LM.build(config(**MODELS[name]), seed=0), tokens(2, 30)
    loss = lm.loss(ids[:, :-1], ids[:, 1:], torch.ones(2, 29)) / 58
    assert float(loss.detach()) == pytest.approx(math.log(61), abs=0.15)


def test_building_leaves_no_trace_on_the_meta_device() -> None:
    assert not any(p.is_meta for p in LM.build(config(pattern="M T M2", depth=3)).parameters())


# ---- logits and losses


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_losses_agree(softcap: float, tied: bool) -> None:
    lm = model("hybrid", softcap=softcap, tie_embeddings=tied)
    with torch.no_grad():
        lm.head_weight.mul_(8)
    inputs, targets = tokens(2, 12), tokens(2, 12, seed=1)
    targets[0, 3:6] = -1
    weights = noise(2, 12).abs()
    logits = lm.logits(lm(inputs))
    assert logits.dtype == torch.float32
    if softcap:
        assert logits.abs().max() <= softcap
        assert logits.abs().max() > 0.5 * softcap
    with torch.no_grad():  # in place there: the same values
        close(lm.logits(lm(inputs)), logits.detach())
    nll = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -1)
    close(lm.nll(inputs, targets), nll.detach(), rtol=1e-4, atol=1e-5)
    assert not lm.nll(inputs, targets).requires_grad
    loss = lm.loss(inputs, targets, weights)
    close(loss, (nll * weights).sum(), rtol=1e-5, atol=1e-4)
    found = torch.autograd.grad(loss, list(lm.parameters()))
    expected = torch.autograd.grad((nll * weights).sum(), list(lm.parameters()))
    for (name, _), a, b in zip(lm.named_parameters(), found, expected):
        close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_the_embedding_is_the_head_when_tied() -> None:
    lm = model("tied")
    assert lm.head is None
    assert lm.head_weight is lm.embed.weight
    assert not [name for name, _ in lm.named_parameters() if name.startswith("head")]


def test_value_embeddings_sit_on_every_other_attention_layer_and_the_last() -> None:
    def layers(pattern: str) -> tuple[int, ...]:
        depth = len(pattern.split())
        return LM.build(config(pattern=pattern, depth=depth, value_embeds=True)).value_layers

    assert layers("T T T") == (0, 2)
    assert layers("T T") == (1,)
    assert layers("M T M T M T T M") == (3, 6)
    assert layers("M M2") == ()
    lm = model("values")
    ids = tokens(1, 6)
    with torch.no_grad():
        before = lm(ids)
        lm.values["2"].weight.add_(1.0)
        assert not torch.allclose(lm(ids), before, atol=1e-3)


@pytest.mark.parametrize("name", ["hybrid", "values"])
def test_recomputing_blocks_gives_the_same_gradients(name: str) -> None:
    lm, ids = model(name).train(), tokens(2, 20)
    segments = torch.tensor([[0] * 7 + [1] * 13, [0] * 20])
    gradients = []
    for lm.checkpointing in (False, True):
        lm.zero_grad()
        lm.loss(ids, ids, torch.ones(2, 20), segments).backward()
        gradients.append({n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(lm.named_parameters()).keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_half_precision_computes_near_the_same_loss() -> None:
    lm, ids = model("hybrid"), tokens(2, 20)
    expected = float(lm.loss(ids, ids, torch.ones(2, 20)).detach())
    lm.compute_dtype = torch.bfloat16
    hidden = lm(ids)
    assert hidden.dtype == torch.bfloat16
    assert lm.logits(hidden).dtype == torch.float32
    assert float(lm.loss(ids, ids, torch.ones(2, 20)).detach()) == pytest.approx(expected, rel=0.02)


# ---- wrong calls


def test_wrong_calls_are_refused() -> None:
    lm = model("hybrid")
    with pytest.raises(UsageError, match="empty sequence"):
        lm(tokens(1, 0))
    with pytest.raises(UsageError, match="lengths need states"):  # without states nothing would keep the rows apart
        lm(tokens(1, 5), lengths=[2, 3])
    with pytest.raises(UsageError, match=r"lengths \[2, 2\] add up to 4, but ids are \(1, 5\)"):
        lm(tokens(1, 5), lm.init_states(2), lengths=[2, 2])
    with pytest.raises(UsageError, match="segments"):
        lm(tokens(1, 5), lm.init_states(1), segments_BT=torch.zeros(1, 5, dtype=torch.int32))


# ---- counts


def test_parameters_are_counted_by_role() -> None:
    lm = model("values")
    count = lm.n_params()
    assert count["total"] == sum(p.numel() for p in lm.parameters())
    assert count["embedding"] == 61 * 32 + 2 * 61 * 16
    assert count["head"] == 61 * 32
    assert count["blocks"] == sum(p.numel() for p in lm.blocks.parameters())
    assert model("tied").n_params()["head"] == 0


def test_flops_of_a_plain_transformer() -> None:
    """6 a weight of blocks and head, and 12 * heads * width * keys for the attention products (PaLM, appendix B)."""
    lm = LM.build(ModelConfig(vocab_size=100, depth=2, d_model=64, pattern="T", head_dim=16, sequence_len=256))
    weights = 2 * (4 * 64 * 64 + 2 * 4 * 64 * 64) + 64 * 100
    assert lm.flops_per_token() == 6 * weights + 2 * 12 * 64 * 256
    assert lm.flops_per_token(128) == 6 * weights + 2 * 12 * 64 * 128
    short = LM.build(
        ModelConfig(vocab_size=100, depth=2, d_model=64, pattern="T", head_dim=16, window=32, window_pattern="SL")
    )
    assert short.flops_per_token(256) == 6 * weights + 12 * 64 * (32 + 256)
    tied = LM.build(ModelConfig(vocab_size=100, depth=2, d_model=64, pattern="T", head_dim=16, tie_embeddings=True))
    assert tied.flops_per_token(256) == lm.flops_per_token(256)


@pytest.mark.parametrize("pattern", ["mamba", "mamba2"])
def test_flops_of_state_spaces_do_not_depend_on_the_length(pattern: str) -> None:
    lm = LM.build(ModelConfig(vocab_size=100, depth=2, d_model=64, pattern=pattern))
    assert lm.flops_per_token(128) == lm.flops_per_token(100_000) > 6 * sum(p.numel() for p in lm.blocks.parameters())
