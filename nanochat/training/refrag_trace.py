"""The command `refrag_trace`: what a model does on the way to its answers, printed or as an HTML page.

    nanochat refrag_trace --questions world:seed=7,known=20,new=200 --n 5
    nanochat refrag_trace --traces out/traces.jsonl --html traces.html
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat import config, runtime
from nanochat.engine.sampling import Sampling
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation.commands import EvalSettings, load
from nanochat.evaluation.rag_commands import RagEvalSettings, choose_questions, is_world, knowledge_of, open_world_of
from nanochat.rag.multihop import SearchTool
from nanochat.rag.multihop_tasks import MultiHopQuestions
from nanochat.rag.rewards import SEARCH_WEIGHTS, Rewards, read_weights
from nanochat.rag.traces import Trace, read_traces, show, write_traces
from nanochat.report_traces import trace_page
from nanochat.training.course import Problem
from nanochat.training.play import Play, Player


@dataclass(frozen=True)
class TraceSettings(EvalSettings):
    """Show the searches, documents, answers and rewards of a model that searches on its own."""

    source: str = "refrag"
    """whose answers: a stage, or the path of a checkpoint, stage or run directory"""
    traces: str = ""
    """show the traces of this file instead"""
    questions: str = "world:seed=7,known=200,new=400"
    """a JSONL file of questions (or HotpotQA's), or a tiny world, whose new entities are asked about"""
    knowledge_base: str | None = None
    """directory of the knowledge base to search (default: of a world its documents; of a file those in its records)"""
    retriever_type: str | None = None
    """simple, bm25, dense or hybrid (default: the knowledge base's own; hybrid for one made for this)"""
    hops: tuple[int, ...] = (2, 3)
    """how many hops the questions of a world take, by turns"""
    max_hops: int = 3
    """searches that the model may make"""
    top_k: int = 2
    """documents a search"""
    n: int = 5
    """answers to show"""
    max_tokens: int = 128
    """tokens that queries and answer may have together"""
    temperature: float = 0.0
    """0: always the most likely token"""
    reward_weights: str = ""
    """as in refrag_finetune: answer=0.6,relevance=0.3,efficiency=0.1"""
    html: str = ""
    """write a page there instead of printing"""
    save: str = ""
    """write the traces there as JSONL, for --traces"""

    def check(self) -> None:
        super().check()
        for flag, least in (("n", 1), ("max_hops", 0), ("top_k", 1), ("max_tokens", 1), ("temperature", 0)):
            if getattr(self, flag) < least:
                raise UsageError(f"--{flag} {getattr(self, flag)}: must be at least {least}")
        if not self.traces:
            self.asked().check(files=True)

    def asked(self) -> RagEvalSettings:
        """Where questions and knowledge come from."""
        return RagEvalSettings(
            source=self.source, mode="refrag", questions=self.questions, knowledge_base=self.knowledge_base,
            retriever_type=self.retriever_type, hops=self.hops, max_problems=self.n, max_unanswerable=0,
            seed=self.seed,
        )  # fmt: skip


def make_traces(settings: TraceSettings) -> list[Trace]:
    """The traces that the settings ask for. Raises UsageError and NanochatError for what cannot be read or asked."""
    settings.check()
    if settings.traces:
        found = read_traces(settings.traces)
        if not found:
            raise NanochatError(f"{settings.traces} holds no trace: `refrag_trace --save FILE` writes them")
        return found[: settings.n]
    asked = settings.asked()
    world = open_world_of(settings.questions) if is_world(settings.questions) else None
    questions = choose_questions(asked, world)
    rewards = Rewards(read_weights(settings.reward_weights) or SEARCH_WEIGHTS)
    with knowledge_of(asked, world, questions) as knowledge:
        loaded = load(settings)
        tokenizer = loaded.tokenizer
        task = MultiHopQuestions(questions, knowledge, top_k=settings.top_k, tokenizer=tokenizer)
        play = Play(
            max_tokens=settings.max_tokens, max_calls=settings.max_hops, max_rows=settings.batch_size,
            max_result_tokens=max(8, 3 * loaded.model.config.sequence_len // 4 // max(1, settings.max_hops)),
        )  # fmt: skip

        def tools(problems: Sequence[Problem]) -> list[SearchTool]:
            return [SearchTool(tokenizer, knowledge, settings.top_k)]

        player = Player(loaded.model, tokenizer, rewards, play, tools)
        problems = [Problem(task, i, task[i], 1) for i in range(min(settings.n, len(task)))]
        sampling = Sampling(settings.max_tokens, settings.temperature, seed=settings.seed)
        return [played.trace(tokenizer) for played in player.play(problems, sampling, 1)]


def refrag_trace(argv: list[str] | None = None) -> None:
    """The command `nanochat refrag_trace`."""
    settings = config.parse(TraceSettings, argv, prog="nanochat refrag_trace")
    try:
        traces = make_traces(settings)
    finally:
        runtime.finish()
    if settings.save:
        write_traces(settings.save, traces)
    if not settings.html:
        print("\n\n".join(map(show, traces)))
        return
    try:
        Path(settings.html).parent.mkdir(parents=True, exist_ok=True)
        Path(settings.html).write_text(trace_page(traces), encoding="utf-8")
    except OSError as error:
        raise NanochatError(f"cannot write {settings.html}: {error.strerror or error}") from None
    print(f"{len(traces)} traces written to {settings.html}")
