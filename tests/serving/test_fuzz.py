"""schemathesis makes requests of the server's own description, good and bad ones: no answer may be a 5xx.

`make test-slow` sends 2,000 and more; here are enough to see that it works.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,negative_data_rejection"
CONFIG = """
[parameters]
"path.name" = "towns"  # most random names are of nothing
[checks.negative_data_rejection]
expected-statuses = [400, 403, 404, 405, 408, 409, 413, 415, 429]
"""


def fuzz(server, directory, phases: str, n: int) -> int:
    """The number of requests sent, `n` at most to each operation."""
    (directory / "schemathesis.toml").write_text(CONFIG)
    options = [
        "--config-file", "schemathesis.toml", "run", f"{server.url}/openapi.json", "--no-color",
        "--checks", CHECKS, "--mode", "all", "--phases", phases, "--max-examples", str(n),
        "--exclude-name", "DELETE /v1/knowledge_bases/{name}",  # the branch that they sit on
        "--generation-deterministic", "--request-timeout", "60", "--warnings", "off",
        "--suppress-health-check", "all", "--continue-on-failure",
    ]  # fmt: skip
    before = sent(server)
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *options],
        cwd=directory, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    after = sent(server)
    told = "\n".join(line[:300] for line in (done.stdout + done.stderr).splitlines())
    assert done.returncode == 0, told[-8000:]
    assert [status for status in after if status.startswith("5")] == []
    return sum(after.values()) - sum(before.values())


def sent(server) -> dict[str, float]:
    """Requests so far by status."""
    with server.client() as client:
        text = client.get("/metrics").text
    found: dict[str, float] = {}
    for status, n in re.findall(r'^nanochat_http_requests_total\{.*status="(\d+)"\} (\S+)$', text, flags=re.M):
        found[status] = found.get(status, 0) + float(n)
    return found


@pytest.fixture
def tool() -> None:
    pytest.importorskip("schemathesis")


@pytest.mark.usefixtures("tool")
def test_a_few_requests(start, tmp_path):
    assert fuzz(start(), tmp_path, "fuzzing", 1) > 15


@pytest.mark.slow
@pytest.mark.usefixtures("tool")
def test_thousands_of_requests(start, tmp_path):
    """Every field's limits from both sides, then random requests."""
    assert fuzz(start(), tmp_path, "coverage,fuzzing", 100) >= 2000
