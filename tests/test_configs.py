"""Every shipped config builds exactly the blocks that its name says; every stage takes it; the tiny ones train."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat import config
from nanochat.model.attention import Attention
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.model.mamba import Mamba
from nanochat.model.mamba2 import Mamba2
from nanochat.runtime import Runtime
from nanochat.training.commands import TokenizerSettings, horizon, train_base, train_tokenizer
from nanochat.training.rag import RagSettings, train_rag
from nanochat.training.refrag import RefragSettings, train_refrag
from nanochat.training.rl_commands import ChatRLSettings, PolicySettings, train_chat_rl
from nanochat.training.settings import BaseSettings, MidSettings, SFTSettings, check_architecture

ROOT = Path(__file__).parents[1]
T, M, M2 = Attention, Mamba, Mamba2
BLOCKS = {
    "transformer_d12": [T] * 12,
    "transformer_d20": [T] * 20,
    "mamba_d12": [M] * 12,
    "mamba_d20": [M] * 20,
    "mamba2_d12": [M2] * 12,
    "mamba2_d20": [M2] * 20,
    "hybrid_early_t_late_m_d12": [T] * 6 + [M] * 6,
    "hybrid_early_t_late_m_d20": [T] * 10 + [M] * 10,
    "hybrid_alternating_d12": [M2, T] * 6,
    "hybrid_alternating_d20": [M2, T] * 10,
    "hybrid_1in4_d12": [M2, M2, M2, T] * 3,
    "hybrid_1in4_d20": [M2, M2, M2, T] * 5,
    "hybrid_1in8_d12": [*[M2] * 7, T, *[M2] * 4],
    "hybrid_1in8_d20": [*[M2] * 7, T, *[M2] * 7, T, *[M2] * 4],
    "tiny_transformer": [T] * 4,
    "tiny_mamba": [M] * 4,
    "tiny_mamba2": [M2] * 4,
    "tiny_hybrid": [M2, M2, M2, T],
}
SMALL = "small_text"  # any pattern
RAG = {"rag_mamba_d20": "mamba_d20", "rag_hybrid_d20": "hybrid_alternating_d20", "rag_tiny": None}
REWARDED = {"refrag_hybrid_d20": RefragSettings, "refrag_tiny": RefragSettings, "rl_tiny": ChatRLSettings}
WIDTH = {"d12": 768, "d20": 1280, "tiny": 64}
GPU = sorted((ROOT / "configs" / "gpu").glob("*.py"))
WORLD = "world:seed=0,known=10,wordings=4"


def path_of(name: str) -> str:
    return str(ROOT / "configs" / f"{name}.py")


def test_the_table_names_every_config() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == set(BLOCKS) | set(RAG) | set(REWARDED) | {SMALL}


@pytest.mark.parametrize("name", BLOCKS)
def test_builds_the_blocks_it_names(name: str) -> None:
    settings = config.parse(BaseSettings, [path_of(name)])
    settings.check()
    with torch.device("meta"):
        model = LM(ModelConfig(vocab_size=1000, **settings.model_options()).resolved())
    assert [type(block.mixer) for block in model.blocks] == BLOCKS[name]
    assert model.config.d_model == next(width for key, width in WIDTH.items() if key in name)
    assert model.config.sequence_len == (128 if name.startswith("tiny") else 2048)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_stage_takes_it_and_flags_win(name: str) -> None:
    for stage in (BaseSettings, MidSettings, SFTSettings):
        settings = config.parse(stage, [path_of(name), "--device_batch_size=2"])
        assert settings.device_batch_size == 2
        assert settings.total_batch_size == (0 if name.startswith("tiny") else 524288)
        assert horizon(replace(settings, num_iterations=1), 0, settings.sequence_len or 0, cpu(world_size=2))[1] >= 1


@pytest.mark.parametrize("pattern", ["transformer", "mamba", "mamba2", "hybrid"])
def test_small_text_takes_any_pattern(pattern: str) -> None:
    settings = config.parse(BaseSettings, [path_of(SMALL), "--pattern", pattern])
    settings.check()
    assert settings.max_minutes == 3
    with torch.device("meta"):
        model = LM(ModelConfig(vocab_size=512, **settings.model_options()).resolved())
    assert model.n_params()["total"] < 2e6


@pytest.mark.parametrize(("name", "base"), RAG.items())
def test_rag_configs_agree_with_the_model_that_they_fine_tune(name: str, base: str | None) -> None:
    settings = config.parse(RagSettings, [path_of(name), "--contexts=documents=3", "--device_batch_size=1"])
    settings.check()
    assert settings.device_batch_size == 1
    if base:
        saved = ModelConfig(vocab_size=1000, **config.parse(BaseSettings, [path_of(base)]).model_options()).resolved()
        check_architecture(saved, settings, base)
    assert horizon(replace(settings, num_iterations=1), 0, settings.sequence_len or 0, cpu(world_size=2))[1] >= 1


@pytest.mark.parametrize(("name", "stage"), REWARDED.items())
def test_configs_of_reinforcement_learning(name: str, stage: type[PolicySettings]) -> None:
    flags = ["--contexts=entities=60"] if name.startswith("refrag") else []
    settings = config.parse(stage, [path_of(name), *flags, "--seed=3"])
    settings.check()
    assert settings.seed == 3
    for world_size in (1, 2):
        assert settings.play().n_micro(world_size) >= 1
    if name.endswith("d20"):
        base = config.parse(BaseSettings, [path_of("hybrid_alternating_d20")])
        saved = ModelConfig(vocab_size=1000, **base.model_options()).resolved()
        check_architecture(saved, settings, "hybrid_alternating_d20")


@pytest.mark.parametrize("path", GPU, ids=[path.stem for path in GPU])
def test_cards_change_rows_and_memory_only(path: Path) -> None:
    card, depth = path.stem.split("_")
    assert card in ("12gb", "16gb", "24gb", "32gb", "80gb")
    alone = config.parse(BaseSettings, [path_of(f"transformer_{depth}")])
    both = config.parse(BaseSettings, [path_of(f"transformer_{depth}"), str(path)])
    same = {"device_batch_size": alone.device_batch_size, "checkpointing": alone.checkpointing}
    assert replace(both, **same) == alone
    for world_size in (1, 2, 8):
        _, n_micro = horizon(replace(both, num_iterations=1), 0, 2048, cpu(world_size))
        assert n_micro * both.device_batch_size * 2048 * world_size == both.total_batch_size == 524288


def cpu(world_size: int = 1) -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, world_size=world_size)


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that have a tokenizer, one for each tiny config."""
    out = tmp_path_factory.mktemp("out")
    for name in BLOCKS:
        if name.startswith("tiny"):
            train_tokenizer(TokenizerSettings(run=name, out_dir=str(out), data=WORLD, vocab_size=400))
    return out


@pytest.mark.parametrize("name", [name for name in BLOCKS if name.startswith("tiny")])
def test_tiny_ones_train(name: str, out_dir: Path) -> None:
    flags = ["--run", name, "--out_dir", str(out_dir), "--data", WORLD, "--num_iterations=2", "--eval_tokens=512"]
    metrics = train_base(config.parse(BaseSettings, [path_of(name), *flags, "--device=cpu", "--dtype=float32"]))
    assert 0 < metrics["train_loss"] < 7
    assert (out_dir / name / "base" / "step_000002" / "meta.json").exists()
    flags = ["--run", name, "--out_dir", str(out_dir), "--source=base", "--num_iterations=2", "--eval_tokens=512"]
    metrics = train_rag(config.parse(RagSettings, [path_of("rag_tiny"), *flags, "--device=cpu", "--dtype=float32"]))
    assert 0 < metrics["train_loss"] < 7
    if name == "tiny_hybrid":
        flags = ["--run", name, "--out_dir", str(out_dir), "--source=base", "--device=cpu", "--dtype=float32"]
        for train, stage, file in (
            (train_chat_rl, ChatRLSettings, "rl_tiny"),
            (train_refrag, RefragSettings, "refrag_tiny"),
        ):
            assert train(config.parse(stage, [path_of(file), *flags]))["final"] == 1.0
        page = (out_dir / name / "report.html").read_text(encoding="utf-8")
        for title in ("Reward, rl", "Reward: answer, rl", "Entropy, rl", "Reward: relevance, refrag"):
            assert f'aria-label="{title}"' in page
        assert page.count('<article class="trace">') == 4 + 8  # of one task, and of two
