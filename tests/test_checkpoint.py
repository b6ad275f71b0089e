"""Checkpoints: what goes in comes out, damage is named, a killed or failed save loses nothing, one writer."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import checkpoint, runtime
from nanochat.errors import NanochatError, UsageError
from nanochat.nest import pack, unpack


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 6, generator=g)
    return {
        "weight": weight,
        "tied": weight,
        "view": weight[2:5, ::2],
        "half": weight.bfloat16(),
        "counts": torch.arange(5),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
    }


def write(stage: Path, step: int, **more) -> Path:
    return checkpoint.save(stage, step, {"model": tensors(step)}, {"model_config": {"depth": 4}}, **more)


def same(a, b) -> bool:
    """Equality of nests by type and value; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a == b or (a != a and b != b)


# ---- round trips


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = {"cursor": {"epoch": 1, "buffer": [np.arange(7, dtype=np.uint16), (1, 2.5)]}, "rng": runtime.rng_state()}
    files = {"model": tensors(), "optim": {"step": torch.tensor(4)}}
    path = checkpoint.save(tmp_path / "base", 400, files, {"model_config": {"depth": 4}, "loss": float("inf")}, state)
    assert path == tmp_path / "base" / "step_000400"
    assert sorted(p.name for p in path.iterdir()) == [
        "meta.json", "model.safetensors", "optim.safetensors", "state.json", "state.safetensors",
    ]  # fmt: skip
    loaded = checkpoint.load(path, files=("model", "optim"))
    assert loaded.step == 400
    assert loaded.meta["model_config"] == {"depth": 4}
    assert loaded.meta["loss"] == float("inf")
    for name, file in files.items():
        assert set(loaded.tensors[name]) == set(file)
        assert all(same(loaded.tensors[name][key], file[key]) for key in file)
    assert same(loaded.state, state)
    assert set(checkpoint.load(path).tensors) == {"model"}
    assert checkpoint.load(write(tmp_path / "base", 401)).state is None


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    runtime.set_seed(5)
    random.gauss(0, 1), np.random.rand(3), torch.randn(3)
    path = write(tmp_path, 1, state={"rng": runtime.rng_state()})
    expected = random.gauss(0, 1), random.random(), np.random.randn(), torch.randn(2).tolist()
    runtime.set_seed(99)
    runtime.set_rng_state(checkpoint.load(path).state["rng"])
    assert (random.gauss(0, 1), random.random(), np.random.randn(), torch.randn(2).tolist()) == expected


numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
dtypes = st.sampled_from(["u2", "u4", "i8", "f4", "f8", "?"])
arrays = st.builds(lambda n, dtype: np.arange(n).astype(dtype), st.integers(0, 4), dtypes)
leaves = st.one_of(numbers, arrays, st.integers(0, 3).map(torch.ones))
keys = st.one_of(st.text(max_size=3), st.integers(0, 3))
nests = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=80, deadline=None)
@given(nest=nests)
def test_any_nest_survives_json(nest: object) -> None:
    held: dict[str, torch.Tensor] = {}
    text = json.dumps(pack(nest, held, "state"))
    assert same(unpack(json.loads(text), held), nest)


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    for bad in ({"a": [1, {1, 2}]}, {"a": [1, np.array(["x"])]}, {"a": [1, object()]}):
        with pytest.raises(UsageError, match=r"state\.a\.1"):
            write(tmp_path, 1, state=bad)
    with pytest.raises(UsageError, match="key"):
        write(tmp_path, 1, state={"__tensor__": 1})
    with pytest.raises(UsageError, match="meta cannot be saved"):
        checkpoint.save(tmp_path, 1, {}, {"x": object()})
    assert list(tmp_path.iterdir()) == []


# ---- damage


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("name", ["meta.json", "model.safetensors", "state.json", "state.safetensors"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_damage_is_named_with_the_checkpoint_to_use(tmp_path: Path, name: str, how: str) -> None:
    write(tmp_path, 300)
    path = write(tmp_path, 400, state={"buffer": np.arange(9), "text": "some text"})
    damage(path / name, how)
    with pytest.raises(NanochatError, match=r"step_000300") as caught:
        checkpoint.load(path).state  # noqa: B018 - reading it is the test
    assert name in str(caught.value)
    assert caught.value.exit_code == 1


def test_damage_without_another_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path, 400)
    damage(path / "model.safetensors", "flipped")
    with pytest.raises(NanochatError, match="no other checkpoint"):
        checkpoint.load(path)
    with pytest.raises(NanochatError, match=r"holds no optim\.safetensors .it has: model\.safetensors"):
        checkpoint.load(path, files=("optim",))
    with pytest.raises(NanochatError, match="no checkpoint directory"):
        checkpoint.load(tmp_path / "nowhere")


# ---- versions


def rewrite_meta(path: Path, **changes) -> None:
    meta = {**json.loads((path / "meta.json").read_text()), **changes}
    meta = {key: value for key, value in meta.items() if value is not None and key != "checksum"}
    if meta["format_version"]:
        meta["checksum"] = checkpoint._meta_checksum(meta)
    (path / "meta.json").write_text(json.dumps(meta))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    rewrite_meta(path, format_version=checkpoint.FORMAT_VERSION + 1)
    with pytest.raises(NanochatError, match=r"meta\.json has format version 2, this nanochat reads up to 1"):
        checkpoint.load(path)


def test_an_older_format_is_upgraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version 0 that called the depth n_layer, and a weight by another name."""
    path = checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {"model_config": {"n_layer": 4}})
    rewrite_meta(path, format_version=0)
    with pytest.raises(NanochatError, match="format version 0, which this nanochat cannot read"):
        checkpoint.load(path)

    def upgrade(meta, tensors) -> None:
        meta["model_config"]["depth"] = meta["model_config"].pop("n_layer")
        for file in tensors.values():
            file["weight"] = file.pop("w")

    monkeypatch.setitem(checkpoint.UPGRADES, 0, upgrade)
    loaded = checkpoint.load(path)
    assert loaded.meta["model_config"] == {"depth": 4} == checkpoint.read_meta(path)["model_config"]
    assert list(loaded.tensors["model"]) == ["weight"]
    assert loaded.meta["format_version"] == checkpoint.FORMAT_VERSION


# ---- failures lose nothing


def test_a_full_disk_leaves_the_old_checkpoints(tmp_path: Path) -> None:
    old = write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(NanochatError, match=r"could not save checkpoint .*step_000002.*free some space"):
            checkpoint.save(tmp_path, 2, {"model": {"big": torch.zeros(100_000)}}, {}, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert checkpoint.load(old).step == 1


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NanochatError, match="could not save"):
        write(tmp_path / "file", 1)
    with pytest.raises(NanochatError, match="cannot write to"), checkpoint.lock(tmp_path / "file"):
        pass


@pytest.mark.parametrize("stop_at", range(10))
def test_a_save_that_stops_anywhere_leaves_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Step 1 is saved over, at every place where the disk is touched: it is there before and after, old or new."""

    class Killed(BaseException):
        pass

    write(tmp_path, 1, state={"old": True})
    calls = iter(range(100))

    def touch(real):
        def call(*args, **kwargs):
            if next(calls) == stop_at:
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", touch(checkpoint._sync))
        patch.setattr(checkpoint.os, "rename", touch(os.rename))
        patch.setattr(checkpoint.shutil, "rmtree", touch(checkpoint.shutil.rmtree))
        with contextlib.suppress(Killed):
            write(tmp_path, 1, state={"old": False})
    with checkpoint.lock(tmp_path):
        found = checkpoint.latest(tmp_path)
        assert found is not None
        assert checkpoint.load(found).state["old"] in (True, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step_000001"]


SAVER = """
import sys, torch
from nanochat import checkpoint
weight = torch.zeros(200_000)
with checkpoint.lock(sys.argv[1]):
    step = 0 if checkpoint.latest(sys.argv[1]) is None else checkpoint.load(checkpoint.latest(sys.argv[1])).step
    print("ready", flush=True)
    while True:
        step += 1
        checkpoint.save(sys.argv[1], step, {"model": {"weight": weight + step}}, {}, {"step": step}, keep_last=2)
"""


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """kill -9 in the middle of saving: the newest checkpoint is whole, and the next writer cleans up."""
    for i in range(2):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.1 + 0.087 * i)
        process.kill()
        process.wait()
        process.stdout.close()
        found = checkpoint.latest(tmp_path)
        if found is not None:
            loaded = checkpoint.load(found)
            assert loaded.state == {"step": loaded.step}
            assert (loaded.tensors["model"]["weight"] == loaded.step).all()
    with checkpoint.lock(tmp_path):
        write(tmp_path, 10**6 - 1, keep_last=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step_999999"]


# ---- which there are


def test_keep_last_and_protect(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step, keep_last=2, protect=(1,))
    assert checkpoint.steps(tmp_path) == [1, 5, 6]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000006"
    write(tmp_path, 1_000_000)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_1000000"
    assert checkpoint.latest(tmp_path / "nothing") is None


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 3, state={"n": 1})
    assert checkpoint.load(write(tmp_path, 3, state={"n": 2})).state == {"n": 2}
    assert checkpoint.steps(tmp_path) == [3]


def test_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    paths = {name: write(tmp_path / "out" / name, 7) for name in ("a/base", "a/mid", "b/base")}
    for age, name in enumerate(["b/base", "a/mid", "a/base"]):
        os.utime(paths[name] / "meta.json", (10**9 + age, 10**9 + age))
    out = tmp_path / "out"
    assert checkpoint.find("base", out, "b") == paths["b/base"]
    caplog.set_level("INFO", "nanochat")
    assert checkpoint.find("base", out) == paths["a/base"]
    assert "the newest is" in caplog.text
    assert checkpoint.find("mid", out) == paths["a/mid"]
    assert checkpoint.find(out / "b" / "base", out) == paths["b/base"]
    assert checkpoint.find(paths["a/mid"], out, "b") == paths["a/mid"]
    assert checkpoint.find(out / "a", out) == paths["a/base"]
    monkeypatch.chdir(out / "b")
    assert checkpoint.find("base", "elsewhere") == Path("base/step_000007")
    for source, run in (("sft", None), (tmp_path / "no" / "where", None), ("", None)):
        with pytest.raises(UsageError, match=r"no such stage in .*there is: .*a/base"):
            checkpoint.find(source, out, run)
    with pytest.raises(UsageError, match=r"--source mid: no such stage in run b in .*there is: base$"):
        checkpoint.find("mid", out, "b")
    with pytest.raises(UsageError, match=r"--run c: no trained run of this name in .*there is: a, b$"):
        checkpoint.find("mid", out, "c")
    for name in ("", "..", "../out/a", str(out / "a")):
        with pytest.raises(UsageError, match="expected a name without slashes"):
            checkpoint.find("base", out, name)
    with pytest.raises(NanochatError, match="nanochat quickstart"):
        checkpoint.find("sft", tmp_path / "empty")


def test_one_writer(tmp_path: Path) -> None:
    with checkpoint.lock(tmp_path / "base"):
        message = rf"another run is writing to .*base \(process {os.getpid()} on"
        with pytest.raises(NanochatError, match=message), checkpoint.lock(tmp_path / "base"):
            pass
        with checkpoint.lock(tmp_path / "mid"):
            pass
    with checkpoint.lock(tmp_path / "base"):
        pass
