"""Tiny random models, and a real server on a real socket for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from nanochat.chat import ChatModel
from nanochat.engine.load import Loaded
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.retrieval.document import Document
from nanochat.serving.server import listen, make_server
from nanochat.serving.settings import ServeSettings
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
DOCUMENTS = [
    Document("torwick", "Torwick was founded by Mara Velt in 1203.", "Torwick", "towns.jsonl"),
    Document("orvane", "Orvane lies on the river Rill.", "Orvane", "towns.jsonl"),
]


def tiny_model(stage: str = "sft", pattern: str = "T", context: int = 256, seed: int = 0) -> ChatModel:
    """A model of random weights that writes printable characters for ever: its end token is out of reach."""
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size, sequence_len=context, depth=2, d_model=32, head_dim=16, pattern=pattern
    ).resolved()
    model = LM.build(config, seed=seed).eval().requires_grad_(False)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(seed))
        model.head.weight[:32] = 0
        model.head.weight[127:] = 0
    return ChatModel(Loaded(model, TOKENIZER, {"stage": stage}, Path("out") / "tiny" / stage / "step_000001"))


def slowed(model: ChatModel, monkeypatch: Any, seconds: float) -> None:
    """Every step of the model takes so long: what happens while it writes can be tested."""
    forward = model.model.logits

    def slow(hidden: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return forward(hidden)

    monkeypatch.setattr(model.model, "logits", slow)


@dataclass
class Running:
    """A server that listens at `url`."""

    url: str
    app: Any
    root: Path

    @property
    def service(self) -> Any:
        return self.app.state.service

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)


def run_server(settings: ServeSettings, models: dict[str, ChatModel]) -> Iterator[Running]:
    server = make_server(settings, models)
    listening = listen(settings.host, settings.port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", server.config.app, settings.knowledge_root)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
