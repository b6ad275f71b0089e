"""Documents of a corpus as the pieces that rows are packed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nanochat.data.batches import Piece
from nanochat.data.corpus import Corpus
from nanochat.tokenizer import Tokenizer


class TextSource:
    """Documents as pieces: <|bos|> first, and the next document's <|bos|> as the last target."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, split: str, threads: int = 2) -> None:
        self.corpus, self.tokenizer, self.split, self.threads = corpus, tokenizer, split, threads
        self.name = f"{corpus.name} ({split})"

    def read(self, epoch: int, start: int) -> Iterator[str]:
        return iter(self.corpus.documents(self.split, start))

    def encode(self, raw: Sequence[str]) -> list[Piece | None]:
        pieces: list[Piece | None] = []
        for ids in self.tokenizer.encode_batch(list(raw), threads=self.threads, bos=True):
            inputs = np.array(ids, dtype=np.int32)
            targets = np.append(inputs[1:], np.int32(self.tokenizer.bos))
            pieces.append(Piece(inputs, targets) if len(ids) > 1 else None)
        return pieces
