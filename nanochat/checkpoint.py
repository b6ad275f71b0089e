"""Checkpoints on disk: a directory of safetensors and JSON that is whole or not there. Knows no model.

    out/<run>/<stage>/step_000400/
        model.safetensors, optim.safetensors, ...   one file for each entry of `files`
        state.json (+ state.safetensors)            loader cursor, RNG: any nest of dict, list, number, text, tensor
        meta.json                                   written last: format version, step, size and sha256 of the others

`save` writes into a hidden directory beside the target, syncs it and renames it, so a reader never sees half of one;
whatever goes wrong, older checkpoints stay. One process may write a stage directory: take `lock` first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.errors import NanochatError, UsageError
from nanochat.lock import lock_file, locked_directory
from nanochat.nest import pack, unpack
from nanochat.runtime import log, run_path

FORMAT_VERSION = 1
Tensors = dict[str, dict[str, Tensor]]
# version v -> function that turns (meta, tensors) of version v into v + 1, in place
UPGRADES: dict[int, Callable[[dict[str, Any], Tensors], None]] = {}

_HIDDEN_NEW, _HIDDEN_OLD = ".new-", ".old-"


@dataclass
class Checkpoint:
    """One loaded checkpoint. `tensors` holds the files asked for; `state` is read and checked at first use."""

    path: Path
    step: int
    meta: dict[str, Any]
    tensors: Tensors = field(repr=False)
    verify: bool = True

    @cached_property
    def state(self) -> dict[str, Any] | None:
        """What `save` got as `state`, tensors on the CPU; None when it got none."""
        if "state.json" not in self.meta["files"]:
            return None
        plain = _read_json(self.path, "state.json", self.meta, self.verify)
        tensors: dict[str, Tensor] = {}
        if "state.safetensors" in self.meta["files"]:
            tensors = _read_tensors(self.path, "state.safetensors", self.meta, "cpu", self.verify)
        return unpack(plain, tensors)


# ---- save


def save(
    stage_dir: str | Path,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    state: Mapping[str, Any] | None = None,
    keep_last: int = 0,
    protect: Collection[int] = (),
) -> Path:
    """Write checkpoint `step` and return its directory; then delete all but the newest `keep_last` (0 = keep all).

    files: file name without suffix -> tensors by name, e.g. {"model": model.state_dict()}. state: nested dict, list,
    tuple, number, text, tensor or array. protect: steps never deleted. Raises NanochatError (disk full, no permission)
    and then leaves nothing behind; UsageError when meta or state holds something that has no place in JSON.
    """
    stage_dir = Path(stage_dir)
    target = stage_dir / f"step_{step:06d}"
    new = stage_dir / f"{_HIDDEN_NEW}{target.name}-{os.getpid()}"
    try:
        stage_dir.mkdir(parents=True, exist_ok=True)
        _sweep(stage_dir)
        new.mkdir()
        with locked_directory(new):
            _write(new, step, files, meta, state)
            _publish(new, target)
    except (OSError, SafetensorError) as error:
        raise NanochatError(
            f"could not save checkpoint {target}: {error}. Older checkpoints are intact; free some space or choose "
            "another --out_dir, then resume"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if keep_last:
        kept = set(steps(stage_dir)[-keep_last:]) | set(protect) | {step}
        for old in set(steps(stage_dir)) - kept:
            delete(stage_dir / f"step_{old:06d}")
    return target


def _write(
    directory: Path,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    state: Mapping[str, Any] | None,
) -> None:
    names = []
    for name, tensors in files.items():
        _save_tensors(tensors, directory / f"{name}.safetensors")
        names.append(f"{name}.safetensors")
    if state is not None:
        tensors_of_state: dict[str, Tensor] = {}
        plain = pack(state, tensors_of_state, "state")
        (directory / "state.json").write_text(_dumps(plain, "state"))
        names.append("state.json")
        if tensors_of_state:
            _save_tensors(tensors_of_state, directory / "state.safetensors")
            names.append("state.safetensors")
    record = {**meta, "format_version": FORMAT_VERSION, "step": step, "files": {}}
    for name in names:
        path = directory / name
        record["files"][name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _sync(path)
    record["checksum"] = _meta_checksum(record)
    (directory / "meta.json").write_text(_dumps(record, "meta", indent=1))
    _sync(directory / "meta.json")
    _sync(directory)


def _publish(new: Path, target: Path) -> None:
    """Make `new` appear as `target` in one rename. A checkpoint already there (the same step saved again after a
    resume) steps aside first; killed between the two renames, `_sweep` puts it back."""
    old = target.with_name(_HIDDEN_OLD + target.name)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def delete(checkpoint: Path) -> None:
    """Hide, then remove: killed in between, no half checkpoint is left under a visible name."""
    hidden = checkpoint.with_name(f"{_HIDDEN_NEW}gone-{checkpoint.name}")
    try:
        os.rename(checkpoint, hidden)
    except OSError as error:
        log.warning("could not delete the old checkpoint %s: %s", checkpoint, error)
        return
    shutil.rmtree(hidden, ignore_errors=True)


def _sweep(stage_dir: Path) -> None:
    """Remove what a killed save left. The writer of a hidden directory holds a lock on it, so one without is dead."""
    for old in stage_dir.glob(f"{_HIDDEN_OLD}step_*"):
        target = stage_dir / old.name.removeprefix(_HIDDEN_OLD)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)
    for new in stage_dir.glob(f"{_HIDDEN_NEW}*"):
        with contextlib.suppress(OSError), locked_directory(new) as mine:
            if mine:
                shutil.rmtree(new, ignore_errors=True)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """safetensors wants contiguous CPU tensors that share no memory: views and tied weights are written out whole."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.numel() * value.element_size():
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        ready[name] = value
    save_file(ready, path)


# ---- load


def load(
    path: str | Path,
    files: Collection[str] = ("model",),
    device: str | torch.device = "cpu",
    verify: bool = True,
) -> Checkpoint:
    """Read a checkpoint directory. `files` names the tensor files to load; `verify` compares sha256 before loading.

    Raises NanochatError that names the file when one is missing, truncated or altered, or when a newer nanochat wrote
    the checkpoint; the message lists another checkpoint to use. Older format versions pass through `UPGRADES`.
    """
    path = Path(path)
    meta = read_meta(path, upgrade=False)
    tensors = {}
    for name in files:
        if f"{name}.safetensors" not in meta["files"]:
            known = ", ".join(sorted(meta["files"])) or "none"
            raise NanochatError(f"checkpoint {path} holds no {name}.safetensors (it has: {known})")
        tensors[name] = _read_tensors(path, f"{name}.safetensors", meta, device, verify)
    _upgrade(path, meta, tensors)
    return Checkpoint(path, int(meta["step"]), meta, tensors, verify)


def read_meta(path: str | Path, upgrade: bool = True) -> dict[str, Any]:
    """`meta.json` of a checkpoint, checked and brought to the current format. Same errors as `load`."""
    path = Path(path)
    file = path / "meta.json"
    if not path.is_dir():
        raise NanochatError(f"no checkpoint directory {path}{_advice(path)}")
    try:
        meta = json.loads(file.read_bytes())
        version, checksum = meta["format_version"], meta.get("checksum")
    except FileNotFoundError:
        raise NanochatError(f"{path} is not a checkpoint: it has no meta.json{_advice(path)}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NanochatError(f"{file} is damaged ({error}){_advice(path)}") from None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise NanochatError(
            f"{file} has format version {version}, this nanochat reads up to {FORMAT_VERSION}: update nanochat"
        )
    if (version >= 1 or checksum is not None) and checksum != _meta_checksum(meta):
        raise NanochatError(f"{file} is damaged (its checksum does not match){_advice(path)}")
    if upgrade:
        _upgrade(path, meta, {})
    return meta


def _upgrade(path: Path, meta: dict[str, Any], tensors: Tensors) -> None:
    while (version := meta["format_version"]) < FORMAT_VERSION:
        if version not in UPGRADES:
            raise NanochatError(f"{path / 'meta.json'} has format version {version}, which this nanochat cannot read")
        UPGRADES[version](meta, tensors)
        meta["format_version"] = version + 1


def _check(path: Path, name: str, meta: dict[str, Any], verify: bool) -> Path:
    file, expected = path / name, meta["files"][name]
    try:
        size = file.stat().st_size
    except OSError as error:
        raise NanochatError(f"{file} is missing ({error.strerror}){_advice(path)}") from None
    if size != expected["bytes"]:
        raise NanochatError(f"{file} is truncated: {size} bytes instead of {expected['bytes']}{_advice(path)}")
    if verify and _sha256(file) != expected["sha256"]:
        raise NanochatError(f"{file} is damaged: its sha256 differs from the one in meta.json{_advice(path)}")
    return file


def _read_tensors(
    path: Path, name: str, meta: dict[str, Any], device: str | torch.device, verify: bool
) -> dict[str, Tensor]:
    file = _check(path, name, meta, verify)
    try:
        return load_file(file, device=str(device))
    except (SafetensorError, OSError) as error:
        raise NanochatError(f"{file} is damaged ({error}){_advice(path)}") from error


def _read_json(path: Path, name: str, meta: dict[str, Any], verify: bool) -> Any:
    file = _check(path, name, meta, verify)
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise NanochatError(f"{file} is damaged ({error}){_advice(path)}") from error


def _advice(path: Path) -> str:
    """What to do about a bad checkpoint: name the newest other one of its stage."""
    others = [step for step in steps(path.parent) if f"step_{step:06d}" != path.name]
    if not others:
        return "; its stage has no other checkpoint: train it again, or give another --source"
    return f"; delete {path} and resume, or use --source {path.parent / f'step_{others[-1]:06d}'}"


# ---- which checkpoints there are


def steps(stage_dir: str | Path) -> list[int]:
    """Steps of the complete checkpoints in a stage directory, ascending. Half-written ones are hidden."""
    found = []
    for meta in Path(stage_dir).glob("step_*/meta.json"):
        digits = meta.parent.name.removeprefix("step_")
        if digits.isdigit():
            found.append(int(digits))
    return sorted(found)


def latest(stage_dir: str | Path) -> Path | None:
    """The newest checkpoint of a stage directory, None when it has none."""
    found = steps(stage_dir)
    return Path(stage_dir) / f"step_{found[-1]:06d}" if found else None


def find(source: str | Path, out_dir: str | Path, run: str | None = None) -> Path:
    """The checkpoint directory that `--source` names: a stage of a run, or a path to a stage, checkpoint or run.

    run None: the run under `out_dir` that wrote this stage last; the log says which. A run directory gives the stage
    written last. Raises UsageError that lists what there is.
    """
    out_dir, source = Path(out_dir), str(source)
    if os.sep not in source and source not in ("", ".", ".."):
        runs = [run_path(out_dir, run)] if run is not None else []
        runs = runs or _newest_first(p for p in out_dir.glob("*") if latest(p / source))
        for run_dir in runs:
            if found := latest(run_dir / source):
                if run is None:
                    log.info("--source %s: the newest is %s", source, found)
                return found
    path = Path(source or os.devnull)
    if (path / "meta.json").is_file():
        return path
    if found := latest(path):
        return found
    if stages := _newest_first(p for p in path.glob("*") if _holds_model(latest(p))):
        found = latest(stages[0])
        assert found is not None
        log.info("--source %s: the stage written last is %s", source, found)
        return found
    raise UsageError(_nothing_found(source, out_dir, run))


def _holds_model(path: Path | None) -> bool:
    """A reward model's checkpoint holds none: it names the model that it reads with."""
    return path is not None and (path / "model.safetensors").is_file()


def _newest_first(directories: Iterator[Path]) -> list[Path]:
    """Stage or run directories, the one with the newest checkpoint first."""

    def written(directory: Path) -> float:
        metas = [*directory.glob("step_*/meta.json"), *directory.glob("*/step_*/meta.json")]
        return max(meta.stat().st_mtime for meta in metas)

    return sorted(directories, key=written, reverse=True)


def _nothing_found(source: str, out_dir: Path, run: str | None) -> str:
    stages = sorted({p.parent.parent for p in out_dir.glob("*/*/step_*/meta.json")})
    runs = sorted({stage.parent.name for stage in stages})
    if run is not None and runs and run not in runs:
        return f"--run {run}: no trained run of this name in {out_dir}; there is: {', '.join(runs)}"
    there = [stage.name if run else str(stage) for stage in stages if run in (None, stage.parent.name)]
    listing = f"there is: {', '.join(there)}" if there else f"{out_dir} holds none; train one: nanochat quickstart"
    where = f"run {run} in {out_dir}" if run else f"{out_dir}"
    return f"--source {source}: no such stage in {where}, and no checkpoint at that path; {listing}"


# ---- one writer


@contextlib.contextmanager
def lock(stage_dir: str | Path) -> Iterator[None]:
    """Hold a stage directory for writing, and tidy up after a killed save. A second process gets a NanochatError at
    once; the kernel frees the lock of a killed one."""
    with lock_file(Path(stage_dir) / ".lock"):
        _sweep(Path(stage_dir))
        yield


# ---- small pieces


def _dumps(value: Any, where: str, indent: int | None = None) -> str:
    """Text of JSON. NaN and infinity pass: a metric may be one, and Python reads them back."""
    try:
        return json.dumps(value, indent=indent)
    except TypeError as error:
        raise UsageError(f"{where} cannot be saved as JSON: {error}") from None


def _meta_checksum(meta: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    as_read = json.loads(_dumps(rest, "meta"))  # what a reader gets: tuples are lists, keys are text
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
