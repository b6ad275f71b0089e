"""Loss by position and passkey, against counting by hand and against models that know or forget by construction."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import checkpoint
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation import position
from nanochat.evaluation.commands import base_eval
from nanochat.evaluation.position import answered, by_position, long_rows, nats, passkey, passkey_case, spans
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
WORLD = "world:seed=0,known=10,wordings=4"


class Texts:
    name = "texts"

    def __init__(self, *documents: str) -> None:
        self.found = documents

    def documents(self, split: str, start: int = 0) -> Any:
        assert split == "val"
        return iter(self.found[start:])


TEXTS = Texts("The fox ran over the hill. " * 8, "A café in Zürich, with a tower. " * 6, "Short.", "The end. " * 40)


def model(pattern: str = "M T", T: int = 32, seed: int = 0) -> LM:
    shape: Any = {"d_model": 32, "head_dim": 16, "d_state": 4, "d_state2": 8, "head_dim2": 16, "sequence_len": T}
    lm = LM.build(ModelConfig(vocab_size=TOKENIZER.vocab_size, depth=2, pattern=pattern, **shape), seed=seed)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return lm.eval().requires_grad_(False)


# ---- by position


@pytest.mark.parametrize("pattern", ["M T", "M M2", "T"])
def test_nats_of_long_rows_are_those_of_one_pass(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position, "PREFILL_TOKENS", 30)
    lm = model(pattern)
    ids = torch.tensor(long_rows(TEXTS, TOKENIZER, 101, 3))
    logits = lm.logits(lm(ids[:, :-1]))
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 100)
    torch.testing.assert_close(nats(lm, ids), expected, rtol=1e-4, atol=1e-4)


def test_rows_are_the_documents_end_to_end() -> None:
    rows = long_rows(TEXTS, TOKENIZER, 100, 5)
    flat = [i for text in TEXTS.found for i in TOKENIZER.encode(text, bos=True)]
    assert [i for row in rows for i in row] == flat[:500]
    assert len(long_rows(TEXTS, TOKENIZER, 100, 1000)) == len(flat) // 100


def test_spans_double_and_stop_at_the_training_length() -> None:
    assert list(spans(600, 300)) == [(0, 64), (64, 128), (128, 256), (256, 300), (300, 512), (512, 600)]
    assert list(spans(50, 32)) == [(0, 32), (32, 50)]
    assert list(spans(128, 512)) == [(0, 64), (64, 128)]


def test_metrics_are_means_over_positions() -> None:
    lm = model(T=32)
    found = by_position(lm, TOKENIZER, TEXTS, 100, n_rows=4, batch_size=3)
    nll = nats(lm, torch.tensor(long_rows(TEXTS, TOKENIZER, 101, 4))).double()
    assert list(found) == ["nats_at_0_31", "nats_at_32_63", "nats_at_64_99", "nats_beyond_minus_within"]
    assert found["nats_at_32_63"].value == pytest.approx(float(nll[:, 32:64].mean()), rel=1e-5)
    expected = float(nll[:, 32:].mean() - nll[:, 16:32].mean())
    assert found["nats_beyond_minus_within"].value == pytest.approx(expected, rel=1e-4)
    assert found["nats_beyond_minus_within"].n == 4
    assert "nats_beyond_minus_within" not in by_position(lm, TOKENIZER, TEXTS, 20, 2)


def test_too_little_text_and_too_few_positions() -> None:
    with pytest.raises(NanochatError, match="shorter than one row"):
        by_position(model(), TOKENIZER, TEXTS, 10_000, 1)
    with pytest.raises(UsageError, match="at least 2"):
        by_position(model(), TOKENIZER, TEXTS, 1, 1)


# ---- passkey


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_case_names_its_key_and_asks_for_it(depth: float) -> None:
    filler = TOKENIZER.encode(TEXTS.found[0])
    case = passkey_case(TOKENIZER, filler, 200, depth, random.Random(5))
    assert len(case.ids) == len(case.control) == 200
    text, control, key = TOKENIZER.decode(case.ids[1:]), TOKENIZER.decode(case.control), TOKENIZER.decode(case.answer)
    assert text.count(key.strip()) == 2
    assert key.strip() not in control
    assert text.endswith(position.ASKED)
    said = text.index(" The pass key is " + key.strip())
    assert abs(said / (200 - len(position.ASKED) - len(position.SAID) - 1) - depth) < 0.03
    assert case == passkey_case(TOKENIZER, filler, 200, depth, random.Random(5))


def test_answers_are_judged_as_greedy_decoding_would() -> None:
    lm = model()
    prompt = TOKENIZER.encode(TEXTS.found[0], bos=True)
    ids = list(prompt)
    for _ in range(4):
        ids.append(int(lm.logits(lm(torch.tensor([ids])))[0, -1].argmax()))
    answer = ids[len(prompt) :]
    right, cost = answered(lm, prompt, answer)
    log_probs = lm.logits(lm(torch.tensor([ids[:-1]])))[0].log_softmax(-1)
    expected = -float(log_probs[len(prompt) - 1 :].gather(1, torch.tensor(answer)[:, None]).mean())
    assert right
    assert cost == pytest.approx(expected, rel=1e-4)
    assert not answered(lm, prompt, [*answer[:-1], (answer[-1] + 1) % 256])[0]


class Knowing:
    """Stands for a model that remembers: behind "key is" it says what followed the first "key is"."""

    device = torch.device("cpu")
    config = ModelConfig(vocab_size=TOKENIZER.vocab_size, sequence_len=64)

    def init_states(self, batch: int, max_len: int = 0) -> list[list[int]]:
        return [[]]

    def __call__(self, ids: Tensor, states: list[list[int]]) -> Tensor:
        hidden = torch.zeros(1, ids.size(1), TOKENIZER.vocab_size)
        for t, token in enumerate(ids[0].tolist()):
            states[0].append(token)
            seen = bytes(i for i in states[0] if i < 256)
            start = seen.rindex(b"key is") + 6 if b"key is" in seen else len(seen)
            first = seen.find(b"key is") + 6
            hidden[0, t, seen[min(first + len(seen) - start, len(seen) - 1)] if seen else 0] = 20.0
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def test_a_model_that_remembers_is_right_and_one_at_random_is_not() -> None:
    perfect: Any = Knowing()
    found = passkey(perfect, TOKENIZER, TEXTS, (120, 300), 5)
    assert [found[f"passkey_{n}"].value for n in (120, 300)] == [1.0, 1.0]
    assert found["passkey_gain_300"].value > 5
    assert found["passkey_300"].n == 5
    at_random = passkey(model(), TOKENIZER, TEXTS, (120,), 5)
    assert at_random["passkey_120"].value == 0.0
    assert abs(at_random["passkey_gain_120"].value) < 1


def test_passkey_needs_room_and_text() -> None:
    with pytest.raises(UsageError, match="--passkey 30"):
        passkey(model(), TOKENIZER, TEXTS, (30,), 1)
    with pytest.raises(NanochatError, match="no text"):
        passkey(model(), TOKENIZER, Texts(), (300,), 1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = model()
    TOKENIZER.save(tmp_path / "r" / "tokenizer")
    meta = {"stage": "base", "model_config": lm.config.to_dict(), "tokenizer_hash": TOKENIZER.hash}
    checkpoint.save(tmp_path / "r" / "base", 1, {"model": lm.state_dict()}, meta)
    base_eval([
        f"--out_dir={tmp_path}", "--run=r", f"--data={WORLD}", "--eval_tokens=256", "--samples=0", "--device=cpu",
        "--by_position", "--position_len=64", "--passkey", "100", "150", "--passkey_samples=2",
    ])  # fmt: skip
    metrics = json.loads((tmp_path / "r" / "base_eval_base.json").read_text())["metrics"]
    wanted = {"nats_at_0_31", "nats_at_32_63", "nats_beyond_minus_within", "passkey_100", "passkey_gain_150"}
    assert wanted <= set(metrics)
    assert all(math.isfinite(m["value"]) for m in metrics.values())
    assert "passkey_150" in capsys.readouterr().out
