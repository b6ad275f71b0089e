"""SmolTalk: general chats, in the selection for small models (Allal et al. 2025; hub: HuggingFaceTB/smol-smoltalk)."""

from __future__ import annotations

from pathlib import Path

from nanochat.tasks.conversations import Conversations
from nanochat.tasks.rows import one_of, open_rows


class SmolTalk(Conversations):
    """Rows: messages. 460K for training, 24K for tests."""

    def __init__(
        self, split: str = "train", path: str | Path | None = None, limit: int | None = None, seed: int | None = 42
    ) -> None:
        one_of("smoltalk: split", split, ("train", "test"))
        rows = open_rows("HuggingFaceTB/smol-smoltalk", "default", split, path, (dict, list))
        super().__init__(f"smoltalk-{split}", rows, limit, seed)
