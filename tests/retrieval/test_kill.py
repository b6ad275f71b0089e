"""A dozen kills at random moments; `python dev/kill_knowledge_base.py` makes as many as you like."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "dev" / "kill_knowledge_base.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_knowledge_base", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("kind", "kills"), [("simple", 8), ("hybrid", 4)])
def test_kills_leave_the_last_or_the_previous_version(
    script: ModuleType, kind: str, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--kind", kind, "--kills", str(kills), "--seed", "1"]) == 0, capsys.readouterr().out
    assert f"{kills} kills" in capsys.readouterr().out
