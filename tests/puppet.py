"""A model that says what a function tells it: the engine, chat and evaluation without a network, with real states."""

import re

import torch

from nanochat.model.config import ModelConfig
from nanochat.model.mixer import State


class Tape(State):
    """All that each row has read."""

    def __init__(self, ids, lengths):
        self.ids, self.lengths = ids, lengths

    def tensors(self):
        return {"ids": self.ids[:, : int(self.lengths.max(initial=0))], "lengths": torch.from_numpy(self.lengths)}

    def map(self, fn):
        now = self.tensors()
        return Tape(fn(now["ids"]), fn(now["lengths"]).numpy())

    def restore(self, snapshot):
        self.ids, self.lengths = snapshot.ids.clone(), snapshot.lengths.copy()

    def rows(self):
        return [row[:n].tolist() for row, n in zip(self.ids, self.lengths)]

    def extend(self, pieces):
        rows = [[*row, *piece] for row, piece in zip(self.rows(), pieces)]
        self.lengths[:] = [len(row) for row in rows]
        self.ids = torch.zeros(len(rows), int(self.lengths.max()), dtype=torch.int64)
        for i, row in enumerate(rows):
            self.ids[i, : len(row)] = torch.tensor(row)


class Puppet:
    """`policy(ids read so far)` is the next token. `n_read` counts tokens that went through; `broken(ids)` says after
    which ones a hidden state is no number."""

    device = torch.device("cpu")

    def __init__(self, vocab_size, policy, sequence_len=1000, broken=lambda ids: False):
        self.config = ModelConfig(vocab_size=vocab_size, sequence_len=sequence_len)
        self.policy, self.broken, self.n_read = policy, broken, 0

    def init_states(self, batch, max_len=0):
        lengths = torch.zeros(batch, dtype=torch.int64).numpy()
        return [Tape(torch.zeros(batch, 0, dtype=torch.int64), lengths)]

    def __call__(self, ids, states, segments=None, lengths=None):
        pieces = ids.tolist() if lengths is None else [piece.tolist() for piece in ids[0].split(list(lengths))]
        self.n_read += ids.numel()
        states[0].extend(pieces)
        said = [torch.nan if self.broken(row) else float(self.policy(row)) for row in states[0].rows()]
        if lengths is None:
            return torch.tensor(said)[:, None, None].expand(*ids.shape, 1)
        return torch.cat([torch.full((len(piece), 1), value) for piece, value in zip(pieces, said)])[None]

    def logits(self, hidden):
        out = torch.zeros(hidden.shape[0], self.config.vocab_size)
        out[torch.arange(hidden.shape[0]), hidden[:, 0].long()] = 30.0
        return out


def searcher(tokenizer, reply, sequence_len=1000):
    """A puppet that searches: `reply(question, documents)` gives the parts of what it says next; documents are those
    read so far, as (number, title, text) by result."""
    start, end = tokenizer.special("assistant_start"), tokenizer.special("result_end")

    def policy(ids):
        if start not in ids:
            return tokenizer.eot
        begun = max(i for i, token in enumerate(ids) if token in (start, end)) + 1
        text = tokenizer.decode(ids)
        question = re.findall(r"<\|user_start\|>(.*?)<\|user_end\|>", text, re.DOTALL)[-1]
        answer = text.rpartition("<|assistant_start|>")[2]
        results = re.findall(r"<\|result_start\|>(.*?)<\|result_end\|>", answer, re.DOTALL)
        pattern = r"<\|doc_start\|> ?(.*?) ?(\d+)<\|doc_title_end\|> (.*?)<\|doc_end\|>"
        documents = [
            [(int(n), title, content) for title, n, content in re.findall(pattern, result, re.DOTALL)]
            for result in results
        ]
        wanted = [*tokenizer.render_parts(reply(question, documents)).ids, tokenizer.eot]
        return wanted[min(len(ids) - begun, len(wanted) - 1)]

    return Puppet(tokenizer.vocab_size, policy, sequence_len)
