"""What a user may set for training, and the error for what they may not."""

from dataclasses import fields
from typing import Any

import pytest

from nanochat.errors import UsageError
from nanochat.model.config import ModelConfig
from nanochat.training.settings import BaseSettings, MidSettings, SFTSettings, TrainSettings, check_architecture


def test_every_architecture_option_is_a_setting_and_unset() -> None:
    options = {f.name for f in fields(ModelConfig)} - {"vocab_size"}  # that is the tokenizer's
    assert options <= {f.name for f in fields(TrainSettings)}
    assert TrainSettings().model_options() == {}
    given = {"depth": 3, "rope": False, "softcap": 0.0}
    assert TrainSettings(**given).model_options() == given  # type: ignore[arg-type]


def test_the_defaults_are_valid() -> None:
    for settings in (BaseSettings(), MidSettings(), SFTSettings()):
        settings.check()
    assert (MidSettings().source, SFTSettings().source, BaseSettings().source) == ("base", "mid", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_batch_size": 0}, "--device_batch_size 0: must be at least 1"),
        ({"n_lanes": 0}, "--n_lanes 0"),
        ({"log_every": 0}, "--log_every 0"),
        ({"keep_last": 0}, "--keep_last 0"),
        ({"eval_tokens": 0}, "--eval_tokens 0"),
        ({"num_iterations": -1}, "--num_iterations -1: must not be negative"),
        ({"max_minutes": -0.5}, "--max_minutes -0.5"),
        ({"save_every": -1}, "--save_every -1"),
        ({"seed": -1}, "--seed -1"),
        ({"lr_scale": -1.0}, "--lr_scale -1.0"),
        ({"lr_scale": float("nan")}, "--lr_scale nan: must not be negative"),
        ({"warmup": 1.5}, "--warmup 1.5: must be between 0 and 1"),
        ({"final_lr": -0.1}, "--final_lr -0.1"),
        ({"compile": "yes"}, "--compile yes: must be one of auto, on, off"),
        ({"wandb": "maybe"}, "--wandb maybe: must be one of off, offline, online"),
    ],
    ids=str,
)
def test_each_mistake_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        BaseSettings(**options).check()


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0])
def test_mid_needs_room_for_conversations(share: float) -> None:
    with pytest.raises(UsageError, match=f"--data_share {share}"):
        MidSettings(data_share=share).check()


# ---- a later stage against its checkpoint

SAVED = ModelConfig(vocab_size=300, depth=4, d_model=48, pattern="hybrid", n_head=2, n_kv_head=1).resolved()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 4},
        {"d_model": 48, "head_dim": 48},
        {"head_dim": 64},  # what base was given: it was cut to the width
        {"n_kv_head": 1},
        {"dt_rank": 0},
        {"pattern": "hybrid"},
        {"pattern": "M2 M2 M2 T"},
        {"pattern": "1in4", "ssm": "M2"},
        {"sequence_len": 17},
        {"softcap": 15.0, "rope": True},
    ],
    ids=str,
)
def test_options_that_agree_with_the_checkpoint_pass(options: dict[str, Any]) -> None:
    check_architecture(SAVED, SFTSettings(**options), "out/x/mid")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 6}, "--depth 6 contradicts the checkpoint out/x/mid, which has depth = 4"),
        ({"d_model": 64}, "--d_model 64 contradicts"),
        ({"pattern": "transformer"}, "--pattern transformer contradicts .* pattern = hybrid"),
        ({"pattern": "M2 M2 T"}, "names 3 blocks"),
        ({"ssm": "M"}, "--ssm M contradicts"),
        ({"n_kv_head": 0}, "--n_kv_head 0 contradicts .* n_kv_head = 1"),
        ({"head_dim": 16}, "--head_dim 16 contradicts"),
        ({"rope": False}, "--rope False contradicts"),
        ({"softcap": 0.0}, "--softcap 0.0 contradicts"),
        ({"norm_eps": 1e-6}, "--norm_eps 1e-06 contradicts"),
    ],
    ids=str,
)
def test_options_that_contradict_the_checkpoint_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_architecture(SAVED, SFTSettings(**options), "out/x/mid")
