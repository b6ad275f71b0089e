"""Several processes: the same run as one, and checkpoints that pass from one number of processes to another."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import copy_run, saved, train

from nanochat import checkpoint
from nanochat.report import read_log
from nanochat.training import distributed
from nanochat.training.loop import Trainer

HERE = Path(__file__).parent


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_two_processes_train_as_one_and_resume_each_others_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("whole", "begun", "cut", "alone", "carried", "carried_alone")
    roots = [copy_run(finished, tmp_path / name, "tokenizer") for name in names]
    # Cautious decay asks for signs, AdamW divides by small gradients: at full rates both blow rounding up to 1e-3.
    options = {"weight_decay": 0.0, "lr_scale": 0.005}
    train("base", roots[3], **options)
    train("base", roots[5], **options, carry_state=True)

    def stop(self: Trainer) -> None:
        if self.progress.step == 7:
            raise KeyboardInterrupt
        original(self)

    original = Trainer.after_step
    with monkeypatch.context() as patch:  # one process begins what two will end: the checkpoint is of step 6
        patch.setattr(Trainer, "after_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train("base", roots[1], **options)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, str(HERE / "two_ranks.py"), *map(str, [*roots[:3], roots[4]])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stderr

    expected = saved(roots[3])
    assert_close(saved(roots[0]), expected)
    assert_close(saved(roots[1]), expected)
    assert checkpoint.steps(roots[2] / "tiny" / "base") == [3, 6]
    train("base", roots[2], **options)  # one process ends what two began
    assert_close(saved(roots[2]), expected)
    assert checkpoint.steps(roots[4] / "tiny" / "base") == [3, 6]
    train("base", roots[4], **options, carry_state=True)
    assert_close(saved(roots[4]), saved(roots[5]))

    alone = read_log(roots[3] / "tiny/base/log.jsonl")
    both = read_log(roots[0] / "tiny/base/log.jsonl")
    assert [r["tokens"] for r in both] == [r["tokens"] for r in alone]
    for key in ("loss", "grad_norm", "val_bpb"):
        assert [r[key] for r in both if key in r] == pytest.approx([r[key] for r in alone if key in r], rel=1e-4)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_are_reduced_in_buckets(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 100)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(3, 5), (40,), (1,), (2, 2, 2), ()]]
    for i, p in enumerate(parameters):
        p.grad = torch.full_like(p, float(i)) + torch.arange(p.numel()).view(p.shape)
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    sizes: list[int] = []

    def double(flat: torch.Tensor) -> None:
        sizes.append(flat.numel())
        flat.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", double)
    distributed.reduce_gradients(parameters)
    assert sizes == [55, 10]
    for p, old in zip(parameters, before):
        assert p.grad is not None
        assert torch.equal(p.grad, 2 * old)


def test_cursors_of_all_ranks_become_one(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_rank(rank: int) -> dict[str, Any]:
        lanes = {str(lane): {"next": [0, lane, lane]} for lane in (rank, rank + 2)}
        report = {"tokens": 10 + rank, "padded": rank}
        return {"cursors": {"text": {"row": 4, "lanes": lanes, "report": report}}, "taken": {"text": 2}}

    def gather(parts: list[Any], mine: Any) -> None:
        parts[:] = [of_rank(0), of_rank(1)]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    whole = distributed.gather_state(of_rank(0))
    assert sorted(whole["cursors"]["text"]["lanes"]) == ["0", "1", "2", "3"]
    assert whole["cursors"]["text"]["report"] == {"tokens": 21, "padded": 1}
    assert whole["taken"] == {"text": 2}


def test_alone_nothing_is_exchanged() -> None:
    state = {"cursors": {}}
    assert distributed.gather_state(state) is state
    p = torch.nn.Parameter(torch.zeros(2))
    distributed.reduce_gradients([p])
    assert p.grad is None
