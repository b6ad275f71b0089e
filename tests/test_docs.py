"""The documentation is true: links resolve, tables and quoted messages are those of the code."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.data.world import World
from nanochat.model.config import expand_pattern, named_patterns
from nanochat.pipeline import PROFILES
from nanochat.tasks.registry import TASKS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("dev/*.md"))]
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def anchors(page: Path) -> set[str]:
    """The names that a forge gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def cells(text: str, heading: str) -> list[list[str]]:
    """The rows of the tables below a heading, without their head."""
    section = text.split(f"\n{heading}\n", 1)[1]
    section = re.split(r"\n#+ ", section)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows[2:] if not set("".join(row)) <= set("- ")]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_resolve(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target} not in {sorted(anchors(file))}"


def test_flag_tables_are_those_of_the_settings() -> None:
    spec = importlib.util.spec_from_file_location("flags", ROOT / "dev" / "flags.py")
    assert spec is not None
    assert spec.loader is not None
    flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flags)
    assert flags.written(CONFIGURATION) == CONFIGURATION, "the tables are old: run `python dev/flags.py`"
    no_flags = {"DenseSettings"}  # of an index
    listed = {place.partition(":")[2] for _, place in flags.TABLES}
    defined = set()
    for path in (ROOT / "nanochat").rglob("*.py"):
        defined |= set(re.findall(r"^class (\w+Settings)\b", path.read_text(), flags=re.M))
    assert listed == defined - no_flags, "dev/flags.py lists other settings classes than there are"


def test_every_flag_says_what_it_does() -> None:
    rows = [line for line in CONFIGURATION.splitlines() if line.startswith("| `--")]
    assert len(rows) > 60
    assert [row for row in rows if row.rstrip(" |").endswith("`") or row.count("|") < 4] == []


def test_environment_variables() -> None:
    source = [path.read_text() for path in (*(ROOT / "nanochat").rglob("*.py"), *(ROOT / "runs").glob("*.sh"))]
    used = set(re.findall(r"NANOCHAT_(?!KERNEL_[A-Z])[A-Z_]+", "\n".join(source)))
    documented = set(re.findall(r"^\| `(NANOCHAT_[A-Z_]+)", CONFIGURATION, flags=re.M))
    assert used == documented


def test_pattern_table() -> None:
    shown = {}
    for first, blocks in cells(CONFIGURATION, "## Patterns"):
        shown |= {name: tuple(blocks.split()) for name in re.findall(r"`(\w+)`", first)}
    assert shown == {name: expand_pattern(name, 8, "M2") for name in named_patterns(8, "M2")}


def test_task_table() -> None:
    shown = {row[0].strip("`"): set(row[1].strip("`").split()) for row in cells(CONFIGURATION, "## Chats: `--tasks`")}
    assert shown == {name: set(entry.options) for name, entry in TASKS.items()}


def test_config_table_names_every_file() -> None:
    named = set(re.findall(r"`(configs/\w+\.py)`", CONFIGURATION))
    assert named == {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}


def test_questions_for_the_quickstart_are_about_known_entities() -> None:
    profile = PROFILES["cpu"]
    world = World(seed=0, n_known=profile.known, n_new=profile.new)
    known = [world.entity(i).name for i in range(profile.known)]
    text = "".join(page.read_text() for page in PAGES)
    told = r'--run quickstart (?!.*--knowledge_base).*?-p "([^"]+)"'  # what it was told, not what it reads
    asked = re.findall(told, text)
    assert len(asked) >= 3
    assert [question for question in asked if not any(name in question for name in known)] == []


def test_architecture_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [path for path in (ROOT / "nanochat").iterdir() if path.name[0] not in "_." and path.name != "py.typed"]
    missing = [path.name for path in rooms if (path.name if path.is_file() else f"{path.name}/") not in text]
    assert missing == []


def test_imports_run_downward() -> None:
    """The contract of pyproject.toml, so that CI sees it."""
    call = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def messages() -> str:
    """All text that the program holds, f-strings without what they interpolate."""
    found = [(ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")]
    for path in (ROOT / "nanochat").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
    return "\n".join(found)


def test_quoted_symptoms_are_real_messages() -> None:
    text = messages()
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = ("Installation", "Data", "Training", "Chat", "Knowledge bases", "Configuration")
    symptoms = "\n".join(row[0] for heading in headings for row in cells(page, f"## {heading}"))
    quoted = [q for q in re.findall(r"`([^`\n]+)`", symptoms) if " " in q and not q.startswith("--dtype")]
    assert len(quoted) > 30
    missing = [quote for quote in quoted for part in quote.split("…") if part.strip() not in text]
    assert missing == []
