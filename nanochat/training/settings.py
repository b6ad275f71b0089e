"""What a user sets for a training run: one frozen dataclass a stage, defaults < configs/x.py < flags."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nanochat.errors import UsageError
from nanochat.model.config import ModelConfig


@dataclass(frozen=True)
class TrainSettings:
    """Shared by every stage. An architecture option that is None comes from `depth` (base) or from the checkpoint
    (later stages); one that contradicts the checkpoint is an error."""

    run: str = "default"
    """name of the run: its stages, tokenizer and report lie under OUT_DIR/RUN"""
    out_dir: str | None = None
    """directory of all runs (default: $NANOCHAT_OUT, or out)"""
    source: str = ""
    """where the weights come from: a stage (base, mid, sft) or the path of a checkpoint"""
    resume: bool = True
    """go on from the newest checkpoint of this stage, if there is one; --no-resume replaces it by a new run"""
    seed: int = 0
    """seed of initialisation, data order and sampling"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: str = "auto"
    """dtype of activations: auto, float32, bfloat16 or float16 (with a loss scaler)"""
    compile: str = "auto"
    """torch.compile: auto (on for CUDA), on or off"""

    device_batch_size: int = 8
    """rows per forward pass and process"""
    total_batch_size: int = 0
    """tokens per optimizer step over all processes (0: one forward pass each); a multiple of rows x sequence_len"""
    num_iterations: int = 0
    """optimizer steps (0: from --target_tokens, or from the stage's own rule)"""
    target_tokens: int = 0
    """tokens to train on (0: the stage's own rule)"""
    max_minutes: float = 0.0
    """end after so many minutes of training, with the schedule laid over that time (0: no limit)"""
    checkpointing: bool = False
    """recompute activations in the backward pass: less memory, slower"""

    start_len: int = 0
    """base_train: tokens a row at the start, doubled until they are sequence_len (0: sequence_len throughout)"""
    grow_share: float = 0.5
    """share of the run after which rows have their full length, with --start_len"""

    matrix_lr: float = 0.02
    """learning rate of Muon (matrices)"""
    embedding_lr: float = 0.3
    """learning rate of embeddings, for a width of 768"""
    head_lr: float = 0.004
    """learning rate of the output head, for a width of 768"""
    small_lr: float = 0.004
    """learning rate of state-space parameters and convolutions, for a width of 768"""
    lr_scale: float = 1.0
    """factor on every learning rate"""
    weight_decay: float = 0.1
    """of the matrices (cautious)"""
    warmup: float = 0.02
    """share of the run in which the learning rate rises"""
    warmdown: float = 0.5
    """share of the run in which it falls"""
    final_lr: float = 0.0
    """learning rate at the end, as a share of the highest"""
    clip: float = 1.0
    """largest norm of the gradient (0: no clipping)"""

    eval_every: int = 200
    """steps between evaluations (0: only at the end)"""
    eval_tokens: int = 65536
    """validation tokens an evaluation"""
    save_every: int = 200
    """steps between checkpoints (0: only at the end)"""
    keep_last: int = 2
    """checkpoints kept"""
    log_every: int = 10
    """steps between lines of log.jsonl"""
    wandb: str = "off"
    """off, offline or online (needs the wandb extra)"""
    n_lanes: int = 8
    """independent data lanes; a multiple of the number of processes"""

    depth: int | None = None
    """layers: the one dial; width, heads and rates follow"""
    sequence_len: int | None = None
    """tokens a row (base: 512 when nothing is said)"""
    d_model: int | None = None
    """width (default 64 x depth)"""
    pattern: str | None = None
    """blocks: transformer, mamba, mamba2, hybrid, early, late, alternate, sandwich, 1in4, 1in8… or letters (MMMT)"""
    ssm: str | None = None
    """letter of the state-space blocks in named hybrid patterns: M or M2"""
    n_head: int | None = None
    """attention heads"""
    n_kv_head: int | None = None
    """key and value heads: 1 is multi-query, between is grouped-query attention"""
    head_dim: int | None = None
    """width of an attention head"""
    rope: bool | None = None
    """rotary positions in attention"""
    rope_base: float | None = None
    """base of the rotary angles"""
    qk_norm: bool | None = None
    """normalise queries and keys"""
    key_offset: bool | None = None
    """half of a key is that of the token before: finds what followed a name"""
    window: int | None = None
    """sliding attention window in tokens (0: full)"""
    window_pattern: str | None = None
    """over attention layers: S window, L full"""
    softcap: float | None = None
    """soft cap of the logits (0: off)"""
    value_embeds: bool | None = None
    """value embeddings on every other attention layer"""
    x0_residual: bool | None = None
    """learned weights of the embedding in every layer's input"""
    embed_norm: bool | None = None
    """normalise the embedding"""
    activation: str | None = None
    """relu2, gelu or swiglu"""
    mlp_t: float | None = None
    """hidden width of the MLP behind T blocks, in widths (0: none)"""
    mlp_m: float | None = None
    """the same behind M blocks"""
    mlp_m2: float | None = None
    """the same behind M2 blocks"""
    tie_embeddings: bool | None = None
    """one matrix for embedding and head"""
    expand: int | None = None
    """inner width of M and M2, in widths"""
    d_state: int | None = None
    """states a channel of M"""
    d_state2: int | None = None
    """states of M2"""
    head_dim2: int | None = None
    """head width of M2"""
    n_groups: int | None = None
    """B, C groups of M2"""
    d_conv: int | None = None
    """width of the causal convolution"""
    dt_rank: int | None = None
    """rank of M's step-size projection"""
    ssm_norm: bool | None = None
    """RMSNorm on M's dt, B, C"""
    norm_eps: float | None = None
    """epsilon of every RMSNorm"""

    def model_options(self) -> dict[str, Any]:
        """The architecture options that were given."""
        names = {f.name for f in fields(ModelConfig)}
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in names}
        return {name: value for name, value in given.items() if value is not None}

    def problems(self) -> list[str]:
        """Everything that is wrong with the flags: each with its value and what is allowed."""
        found: list[str] = []
        for flag in ("device_batch_size", "keep_last", "log_every", "n_lanes", "eval_tokens"):
            if getattr(self, flag) < 1:
                found.append(f"--{flag} {getattr(self, flag)}: must be at least 1")
        for flag in (
            "total_batch_size", "num_iterations", "target_tokens", "eval_every", "save_every", "clip", "max_minutes",
            "seed", "start_len", "lr_scale", "matrix_lr", "embedding_lr", "head_lr", "small_lr", "weight_decay",
        ):  # fmt: skip
            if not getattr(self, flag) >= 0:  # nan neither
                found.append(f"--{flag} {getattr(self, flag)}: must not be negative")
        for flag in ("warmup", "warmdown", "final_lr", "grow_share"):
            if not 0 <= getattr(self, flag) <= 1:
                found.append(f"--{flag} {getattr(self, flag)}: must be between 0 and 1")
        for flag, allowed in (("compile", ("auto", "on", "off")), ("wandb", ("off", "offline", "online"))):
            if getattr(self, flag) not in allowed:
                found.append(f"--{flag} {getattr(self, flag)}: must be one of {', '.join(allowed)}")
        return found

    def check(self) -> None:
        """Raises one UsageError for all `problems`."""
        if found := self.problems():
            raise UsageError("\n".join(found))


RESOLVED = ("d_model", "n_head", "n_kv_head", "head_dim", "head_dim2", "dt_rank")


def check_architecture(saved: ModelConfig, settings: TrainSettings, where: str) -> None:
    """Raises UsageError when an option that was given is not what the checkpoint holds."""
    for name, value in settings.model_options().items():
        have = getattr(saved, name)
        same = value == have or name == "sequence_len"  # a later stage may train on shorter or longer rows
        if name in ("pattern", "ssm"):
            same = replace(saved, **{name: value}).blocks == saved.blocks
        elif name in RESOLVED:  # 0 or more than fits means what it meant when the model was made
            with suppress(UsageError):
                same = getattr(replace(saved, **{name: value}).resolved(), name) == have
        if not same:
            raise UsageError(
                f"--{name} {value} contradicts the checkpoint {where}, which has {name} = {have}: "
                "leave the option out, or name another --source"
            )


@dataclass(frozen=True)
class BaseSettings(TrainSettings):
    """Pretraining on raw text."""

    data: str = "world:seed=0,known=200"
    """where text comes from: world:… (the tiny world), a directory or file of txt, jsonl or parquet, or climbmix"""
    tokens_per_param: float = 20.0
    """training tokens per parameter of the blocks, when no number of steps or tokens is given"""
    carry_state: bool = False
    """a document longer than a row goes on in the next one from the state behind it (truncated backpropagation)"""

    def check(self) -> None:
        super().check()
        if self.carry_state and (self.start_len or self.checkpointing):
            other = "start_len" if self.start_len else "checkpointing"
            raise UsageError(f"--carry_state and --{other} exclude each other: leave one out")


@dataclass(frozen=True)
class MidSettings(TrainSettings):
    """Mid-training: text and conversations mixed."""

    source: str = "base"
    """where the weights come from: a stage or a path"""
    data: str = ""
    """raw text mixed in, as for base_train (empty: none)"""
    data_share: float = 0.5
    """share of rows that are raw text"""
    tasks: tuple[str, ...] = field(default=("world-qa:seed=0,known=200",))
    """conversations, as specs of nanochat.tasks (several: repeat or separate by commas outside of specs)"""
    epochs: float = 1.0
    """passes over the tasks, when no number of steps or tokens is given"""
    lr_scale: float = 0.5
    """factor on every learning rate"""

    def check(self) -> None:
        super().check()
        if not 0 <= self.data_share < 1:
            raise UsageError(f"--data_share {self.data_share}: must be at least 0 and below 1 (the rest are chats)")


@dataclass(frozen=True)
class SFTSettings(TrainSettings):
    """Supervised fine-tuning on conversations."""

    source: str = "mid"
    """where the weights come from: a stage or a path"""
    tasks: tuple[str, ...] = field(default=("world-qa:seed=0,known=200",))
    """conversations, as specs of nanochat.tasks"""
    epochs: float = 1.0
    """passes over the tasks, when no number of steps or tokens is given"""
    lr_scale: float = 0.2
    """factor on every learning rate"""
    warmdown: float = 1.0
    """share of the run in which the learning rate falls"""
