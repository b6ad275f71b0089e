"""One finished tiny run for all tests of this folder."""

from pathlib import Path

import pytest
from tiny import STAGES, make_tokenizer, train


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run whose tokenizer, base, mid and sft are complete. Copy what you change."""
    root = tmp_path_factory.mktemp("finished")
    make_tokenizer(root)
    for stage in STAGES:
        train(stage, root)
    return root
