"""Servers for the tests of this room; `tiny_server` makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from tiny_server import DOCUMENTS, Running, run_server, tiny_model

from nanochat.chat import ChatModel
from nanochat.retrieval import KnowledgeBase
from nanochat.serving.settings import ServeSettings


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Starts servers: start(models, setting=...)."""
    running: list[Iterator[Running]] = []

    def go(models: dict[str, ChatModel] | None = None, **settings: Any) -> Running:
        root = tmp_path_factory.mktemp("kb")
        base = KnowledgeBase.create(root / "towns", kind="simple")
        base.add(DOCUMENTS)
        base.close()
        options = {"port": 0, "knowledge_dir": str(root), "embedder": "hashed:64", "drain_seconds": 2.0, **settings}
        models = models or {"tiny-sft": tiny_model(), "tiny-rag": tiny_model("rag", "M", context=512, seed=1)}
        iterator = run_server(ServeSettings(**options), models)
        running.append(iterator)
        return next(iterator)

    yield go
    for iterator in running:
        next(iterator, None)


@pytest.fixture(scope="module")
def server(start: Callable[..., Running]) -> Running:
    """One server for a module."""
    return start()


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


from pages import browser, running_site, site, start_site, visit  # noqa: E402, F401 (fixtures of the page's tests)
