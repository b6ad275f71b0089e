"""docs/rl.md: its Python runs, its tables are those of the code, the messages that it quotes exist."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

from nanochat.rag import rewards
from nanochat.rag.rewards import CHAT_WEIGHTS, REWARDS, SEARCH_WEIGHTS
from nanochat.training import collapse, policy
from nanochat.training.refrag import RefragSettings
from nanochat.training.reinforce import ADVANTAGES, PER, Objective
from nanochat.training.reward_model import RewardSettings
from nanochat.training.rl_commands import ChatRLSettings

GUIDE = (Path(__file__).parents[2] / "docs" / "rl.md").read_text()


def section(heading: str) -> str:
    return re.split(r"\n## ", GUIDE.split(f"\n## {heading}\n", 1)[1])[0]


def first_cells(text: str) -> list[str]:
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:]


def test_python_runs() -> None:
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", GUIDE, flags=re.M | re.S):
        exec(block, names)
    assert names["rewards"].names == ("answer", "brief", "format")


def test_tables_are_those_of_the_code() -> None:
    assert [name.strip("`") for name in first_cells(section("Rewards"))] == list(REWARDS)
    for weights in (CHAT_WEIGHTS, SEARCH_WEIGHTS):
        assert ",".join(f"{name}={value:g}" for name, value in weights.items()) in GUIDE
    told = section("The objective")
    assert all(f"`{name}`:" in told for name in (*ADVANTAGES, *PER))
    assert f"{Objective().clip_low} and {Objective().clip_high}" in told


def test_every_flag_exists() -> None:
    known = {f.name for settings in (ChatRLSettings, RefragSettings, RewardSettings) for f in fields(settings)}
    flags = set(re.findall(r"--(\w+)", GUIDE)) - {"no", "standalone", "nproc_per_node"}
    assert len(flags) > 25
    assert flags <= known


def test_quoted_signs_are_real() -> None:
    source = "".join(inspect.getsource(module) for module in (collapse, policy, rewards))
    signs = [sign for cell in first_cells(section("When it goes wrong")) for sign in re.findall(r"`(\w+ [^`]+)`", cell)]
    assert len(signs) >= 5
    for sign in signs:
        assert sign.rstrip(" …") in re.sub(r'"\s*f?"', "", source), sign
