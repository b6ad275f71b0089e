"""What is served: models with their schedulers, knowledge bases, figures; and what a request may ask of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any, TypeVar

from fastapi import Request

from nanochat.chat import ChatModel, trained_on_retrieval, trained_to_search
from nanochat.engine.batching import Scheduler
from nanochat.engine.prefix import PrefixCache
from nanochat.retrieval.document import Embedder
from nanochat.serving.errors import ApiError
from nanochat.serving.knowledge import Shelf
from nanochat.serving.metrics import Metrics
from nanochat.serving.settings import ServeSettings
from nanochat.serving.uploads import Uploads

THREADS = 8  # that lay out prompts, search and embed beside the event loop
R = TypeVar("R")


class Served:
    """One model and the scheduler whose thread owns it."""

    def __init__(self, name: str, chat: ChatModel, settings: ServeSettings) -> None:
        self.name, self.chat, self.created = name, chat, int(time.time())
        self.scheduler = Scheduler(
            chat.model,
            chat.tokenizer,
            max_rows=max(settings.max_rows, settings.max_n),
            max_queue=settings.max_queue,
            memory_bytes=settings.memory_mb << 20 or None,
            prefill_chunk=settings.prefill_chunk,
            prefix_cache=PrefixCache(settings.prefix_cache_mb << 20) if settings.prefix_cache_mb else None,
            pace=settings.pace_ms / 1000,
        )

    @property
    def can_chat(self) -> bool:
        """A base model only continues texts."""
        return self.chat.stage != "base"

    @property
    def can_search(self) -> bool:
        """Whether it was trained to search by itself, several times."""
        return trained_to_search(self.chat.meta)

    def card(self) -> dict[str, Any]:
        """As /v1/models lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochat",
            "stage": self.chat.stage,
            "context": self.chat.context,
            "chat": self.can_chat,
            "trained_on_documents": trained_on_retrieval(self.chat.meta),
            "multi_hop": self.can_search,
            "suggestions": self.chat.meta.get("suggestions", []),
        }


class Service:
    """Everything that routes need, in one place. `close` ends its threads."""

    def __init__(self, settings: ServeSettings, models: Mapping[str, ChatModel]) -> None:
        self.settings = settings
        self.models = {name: Served(name, chat, settings) for name, chat in models.items()}
        self.shelf = Shelf(settings.knowledge_root, settings.embedder)
        self.metrics = Metrics(
            lambda: {name: asdict(served.scheduler.stats()) for name, served in self.models.items()}
        )
        self.uploads = Uploads(self.shelf, int(settings.max_upload_mb * (1 << 20)), self.metrics.uploads)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="serve")

    def start(self) -> None:
        for served in self.models.values():
            served.scheduler.start()

    def close(self) -> None:
        for served in self.models.values():
            served.scheduler.close()
        self.uploads.close()
        self._threads.shutdown(cancel_futures=True)
        self.shelf.close()

    def model(self, name: str | None) -> Served:
        """The model of this name, or the first. Raises ApiError (404)."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            there = ", ".join(self.models)
            raise ApiError(404, f"The model does not exist; there is {there}", code="model_not_found", param="model")
        return self.models[name]

    async def run(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """A function that takes its time, on a thread of ours."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args, **kwargs))

    @cached_property
    def embedder(self) -> Embedder:
        """Of /v1/embeddings; loaded at the first use. Raises UsageError where its packages are missing."""
        return self.shelf.embedder()


def service_of(request: Request) -> Service:
    """The service behind a request, for routes."""
    service: Service = request.app.state.service
    return service


def client_of(request: Request) -> str:
    """Whose request it is: a name of its key, or its address."""
    return str(getattr(request.state, "client", "local"))
