"""A model that reads and answers at random: what the tests of RAG evaluation ask."""

import torch

from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM


def build_reader(tokenizer, sequence_len=1024):
    shape = {"depth": 2, "d_model": 32, "n_head": 2, "pattern": "M2 T", "sequence_len": sequence_len}
    model = LM.build(ModelConfig(vocab_size=tokenizer.vocab_size, **shape), seed=0)
    with torch.no_grad():
        model.head.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(0))
    return model.eval()


def hotpot(i, answer="Torwick"):
    context = [[f"Mara {i}", [f"Mara {i} was born", " in Torwick."]], ["Torwick", ["Torwick is old."]],
               [f"Bram {i}", ["Bram likes soup."]]]  # fmt: skip
    return {"_id": f"h{i}", "question": f"Where was Mara {i} born?", "answer": answer, "context": context,
            "supporting_facts": [[f"Mara {i}", 0], ["Torwick", 0]]}  # fmt: skip
