"""Long texts read in pieces, states in files: the same as reading all at once, refused by every other model."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.engine import generate
from nanochat.engine.generate import Engine
from nanochat.engine.load import set_compute_dtype
from nanochat.engine.reading import Reading
from nanochat.engine.sampling import Sampling
from nanochat.engine.state_file import fingerprint, load_states, save_states
from nanochat.errors import NanochatError, UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
GREEDY = Sampling(max_tokens=12, temperature=0.0)
TEXT = "In the year 1821 the town of Torwick had three hundred people, and a tower that nobody had built. " * 2


def engine(pattern: str = "M T M2", seed: int = 0, **options: Any) -> Engine:
    shape = {"d_model": 32, "head_dim": 8, "d_state": 4, "d_state2": 8, "head_dim2": 16, "sequence_len": 512}
    config = ModelConfig(vocab_size=TOKENIZER.vocab_size, depth=3, pattern=pattern, **{**shape, **options})
    model = LM.build(config, seed=seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return Engine(model.eval().requires_grad_(False), TOKENIZER, eos=())


# ---- reading


@pytest.mark.parametrize("pattern", ["M T M2", "M", "T"])
def test_pieces_are_as_one_prompt(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.engine.reading.PREFILL_TOKENS", 17)
    e = engine(pattern)
    (expected,) = e.generate_batch([TOKENIZER.encode(TEXT, bos=True)], GREEDY)
    reading = Reading(e)
    for start in range(0, len(TEXT), 50):
        reading.read(TEXT[start : start + 50])
    assert reading.n_tokens == len(TEXT) + 1
    (found,) = reading.generate(sampling=GREEDY)
    assert found.ids == expected.ids
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    assert found.finish_reason == "length"


def test_generating_leaves_the_reading_where_it_was() -> None:
    e = engine()
    reading = Reading(e).read(TEXT[:40])
    (first,) = reading.generate(TEXT[40:80], GREEDY)
    assert reading.n_tokens == 41
    (expected,) = e.generate_batch([TOKENIZER.encode(TEXT[:80], bos=True)], GREEDY)
    assert first.ids == expected.ids
    assert reading.read(TEXT[40:80]).generate(sampling=GREEDY)[0].ids == expected.ids
    pieces = reading.stream(sampling=GREEDY)
    assert "".join(pieces) == expected.text


def test_several_completions_and_their_seeds() -> None:
    e = engine()
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=3)
    expected = e.generate_batch([TOKENIZER.encode(TEXT, bos=True)], sampling, n=3)
    found = Reading(e).read(TEXT).generate(sampling=sampling, n=3)
    assert [c.ids for c in found] == [c.ids for c in expected]
    e.eos = frozenset({found[0].ids[2]})
    ended = Reading(e).read(TEXT).generate(sampling=sampling, n=3)
    assert ended[0].finish_reason == "stop"
    assert len(ended[0].ids) <= 3


def test_ids_may_be_read_as_they_are() -> None:
    e = engine()
    ids = TOKENIZER.encode(TEXT, bos=True)
    a, b = Reading(e).read(ids).generate(sampling=GREEDY)[0], Reading(e).read(TEXT).generate(sampling=GREEDY)[0]
    assert a == b


def test_nothing_read() -> None:
    with pytest.raises(UsageError, match="nothing was read"):
        Reading(engine()).generate()
    with pytest.raises(UsageError, match="n=0"):
        Reading(engine()).read("a").generate(n=0)


@pytest.mark.parametrize(("pattern", "warns"), [("M T M2", True), ("M M2 M", False)])
def test_beyond_the_context(pattern: str, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    e = engine(pattern, sequence_len=32)
    with caplog.at_level(logging.WARNING, "nanochat"):
        reading = Reading(e).read(TEXT).read(TEXT)
    assert (len(caplog.records) == 1) == warns
    assert len(reading.generate(sampling=GREEDY)[0].ids) == 12


def test_a_mamba_state_has_one_size() -> None:
    e = engine("M M2 M")
    assert Reading(e).read("a").nbytes == Reading(e).read(TEXT).nbytes


# ---- files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return Reading(engine()).read(TEXT).save(tmp_path / "deep" / "text.state")


@pytest.mark.parametrize("pattern", ["M T M2", "M", "M2", "T"])
def test_days_later(pattern: str, tmp_path: Path) -> None:
    reading = Reading(engine(pattern)).read(TEXT)
    path = reading.save(tmp_path / "text.state")
    again = Reading.load(engine(pattern), path)
    assert again.n_tokens == reading.n_tokens
    assert again.generate(sampling=GREEDY) == reading.generate(sampling=GREEDY)
    assert again.generate(" And", GREEDY) == reading.generate(" And", GREEDY)
    assert again.read(" And").generate(sampling=GREEDY) == reading.generate(" And", GREEDY)
    empty = Reading.load(engine(pattern), Reading(engine(pattern)).save(tmp_path / "empty.state"))
    assert empty.n_tokens == 0
    assert empty.read(TEXT).generate(sampling=GREEDY) == reading.generate(sampling=GREEDY)


def test_another_model_is_refused(saved: Path) -> None:
    for other in (engine(seed=1), engine("M M2 T"), engine(sequence_len=1024)):
        with pytest.raises(UsageError, match="states of another model"):
            Reading.load(other, saved)
    trained = engine()
    with torch.no_grad():
        trained.model.blocks[0].mixer.A_log[0, 0] += 1e-3  # type: ignore[union-attr, index, operator]
    with pytest.raises(UsageError, match="other weights"):
        Reading.load(trained, saved)
    other_dtype = engine()
    set_compute_dtype(other_dtype.model, torch.bfloat16)
    with pytest.raises(UsageError, match="--dtype"):
        Reading.load(other_dtype, saved)


def test_another_tokenizer_is_refused(saved: Path) -> None:
    e = engine()
    e.tokenizer = Tokenizer([bytes([255 - i]) for i in range(256)])
    with pytest.raises(UsageError, match="another tokenizer"):
        Reading.load(e, saved)


def test_every_changed_byte_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    for at in range(8, len(whole), max(1, len(whole) // 60)):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises((NanochatError, UsageError)):
            Reading.load(engine(), saved)
    for cut in (0, 7, 100, len(whole) - 1):
        saved.write_bytes(whole[:cut])
        with pytest.raises(NanochatError, match="damaged"):
            Reading.load(engine(), saved)
    saved.unlink()
    with pytest.raises(NanochatError, match="no file of states"):
        Reading.load(engine(), saved)


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanochat.engine.state_file.save_file", full)
    with pytest.raises(NanochatError, match="No space left"):
        Reading(engine()).save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_states_of_several_rows(tmp_path: Path) -> None:
    e = engine()
    prompts = [TOKENIZER.encode(TEXT[:n], bos=True) for n in (30, 9, 21)]
    states, _ = generate.prefill(e.model, prompts)
    save_states(tmp_path / "rows", states, e.model, "a", {"names": ["x", "y", "z"]})
    found, about, more = load_states(tmp_path / "rows", e.model, "a")
    assert (about, more) == ({"names": ["x", "y", "z"]}, {})
    for state, expected in zip(found, states):
        assert all(torch.equal(state.tensors()[name], x) for name, x in expected.tensors().items())
    ids = torch.tensor([[1], [2], [3]])
    torch.testing.assert_close(e.model(ids, found), e.model(ids, states))


def test_fingerprints() -> None:
    assert fingerprint(engine().model) == fingerprint(engine().model)
    assert len({fingerprint(engine(seed=i).model) for i in range(3)}) == 3
