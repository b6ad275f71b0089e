"""The command `rag_eval`: a checkpoint and questions in; one table and a JSON file beside the stages of its run out.

With `--mode refrag` the model searches on its own, beside one search for as many documents."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nanochat import config, runtime
from nanochat.chat import trained_on_retrieval
from nanochat.data.corpus import open_world
from nanochat.data.spec import read_options, split_spec
from nanochat.data.world import World
from nanochat.engine.load import Loaded
from nanochat.engine.sampling import Sampling
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation.commands import EvalSettings, load
from nanochat.evaluation.metrics import write_metrics
from nanochat.evaluation.rag import Options, measure_rag
from nanochat.evaluation.rag_questions import world_questions
from nanochat.evaluation.rag_result import CONDITIONS, HEADINGS, RagResult
from nanochat.evaluation.refrag import QUERIES, Hops, measure_refrag
from nanochat.rag.knowledge import open_knowledge
from nanochat.rag.prompt import ORDERS
from nanochat.rag.questions import RagQuestion, complain, load_questions
from nanochat.rag.tasks import as_document
from nanochat.retrieval.document import Document
from nanochat.runtime import log

LONGEST = {"rag": 64, "refrag": 128}  # tokens of an answer, by mode
RETRIEVER_TYPES = ("simple", "bm25", "dense", "hybrid")


@dataclass(frozen=True)
class RagEvalSettings(EvalSettings):
    """Evaluate answers from documents: right, made up, cited, abstained; against closed book and shuffled documents."""

    source: str = ""
    """what to evaluate: a stage (default: that of the mode), or the path of a checkpoint, stage or run directory"""
    mode: Literal["rag", "refrag"] = "rag"
    """rag: documents stand before the question; refrag: the model also searches on its own, hop by hop"""
    hops: tuple[int, ...] = ()
    """how many hops the questions of a world take, by turns (default: 1; with --mode refrag 2 and 3)"""
    max_hops: int = 3
    """searches that the model may make (--mode refrag)"""
    hop_k: int = 2
    """documents a search of the model's own (--mode refrag; the one search compared with brings max_hops times that)"""
    query: Literal["model", "template"] = "model"
    """who writes the queries (--mode refrag)"""
    questions: str = "world:seed=7,known=200,new=400"
    """a JSONL file of questions (or HotpotQA's), or a tiny world, whose new entities are asked about"""
    knowledge_base: str | None = None
    """directory of the knowledge base to search (default: of a world its documents; of a file those in its records)"""
    retriever_type: str | None = None
    """simple, bm25, dense or hybrid (default: the knowledge base's own; hybrid for one made of a world)"""
    top_k: int = 5
    """documents to retrieve for each question (--mode refrag: see hop_k)"""
    order: str = "shuffled"
    """order of the documents in the prompt: best_first, best_last or shuffled (by --seed)"""
    max_tokens_documents: int = 0
    """tokens that documents may take (0: all that question and answer leave)"""
    reread: bool = True
    """answer twice, the second time from the documents that the first answer cites (False: the first one counts)"""
    conditions: tuple[str, ...] = ()
    """columns of the table (default: all of the mode): closed_book, rag, rag_gold, rag_shuffled, no_documents, refrag,
    refrag_shuffled"""
    max_problems: int = 500
    """questions that have an answer (0: all of a file)"""
    max_unanswerable: int = 500
    """questions that nothing answers (0: all of a file, none of a world)"""
    max_tokens: int | None = None
    """longest answer (default: 64; with --mode refrag 128: what leads to the answer counts too)"""
    temperature: float = 0.0
    """0: always the most likely token"""
    contrast: bool = False
    """measure the hallucination score by the model's own contrast too: two more passes for each answer"""
    latency_questions: int = 10
    """questions that are answered one at a time for the latency"""
    samples: int = 6
    """answers of each column to keep in the JSON file"""

    @property
    def longest(self) -> int:
        """Tokens that an answer may have."""
        return LONGEST[self.mode] if self.max_tokens is None else self.max_tokens

    def check(self, files: bool = False) -> None:
        """Raises one UsageError for all flags that are wrong, and with `files` for those that name nothing."""
        problems = []
        least = {
            "batch_size": 1, "top_k": 1, "max_hops": 1, "hop_k": 1, "max_tokens": 1, "max_problems": 0,
            "max_unanswerable": 0, "max_tokens_documents": 0, "latency_questions": 0, "samples": 0,
        }  # fmt: skip
        for flag, low in least.items():
            if (value := getattr(self, flag)) is not None and value < low:
                problems.append(f"--{flag} {value}: must be at least {low}")
        if self.retriever_type not in (None, *RETRIEVER_TYPES):
            problems.append(f"--retriever_type {self.retriever_type}: must be one of {', '.join(RETRIEVER_TYPES)}")
        if self.order not in ORDERS:
            problems.append(f"--order {self.order}: must be one of {', '.join(ORDERS)}")
        known = HEADINGS if self.mode == "refrag" else CONDITIONS
        unknown = [name for name in self.conditions if name not in known]
        if unknown:
            problems.append(f"--conditions {' '.join(unknown)}: must be among {', '.join(known)} (--mode {self.mode})")
        if not set(self.hops) <= {1, 2, 3}:
            problems.append(f"--hops {' '.join(map(str, self.hops))}: must be among 1, 2, 3")
        if self.temperature < 0:
            problems.append(f"--temperature {self.temperature}: must be at least 0")
        if files and self.knowledge_base is not None and not Path(self.knowledge_base).is_dir():
            problems.append(f"--knowledge_base {self.knowledge_base}: there is no such directory")
        if files and not is_world(self.questions):
            path = Path(self.questions)
            if not path.is_file():
                what = "this is no file" if path.exists() else "there is no such file"
                problems.append(f"--questions {self.questions}: {what}, and it is no world:seed=…,new=…")
            elif problems:  # without other problems the file speaks for itself, when it is read
                try:
                    load_questions(path)
                except NanochatError as error:
                    problems.append(str(error))
        if len(problems) == 1:
            raise UsageError(problems[0])
        complain(problems, "nothing was evaluated")


def evaluate_rag_settings(settings: RagEvalSettings) -> RagResult:
    """Evaluate, print the table, and write `<mode>_eval_<stage>.json` into the run's directory."""
    settings.check(files=True)
    settings = replace(settings, source=settings.source or settings.mode)
    world = open_world_of(settings.questions) if is_world(settings.questions) else None
    questions = choose_questions(settings, world)
    with knowledge_of(settings, world, questions) as knowledge:
        loaded = load(settings)
        if settings.mode == "rag" and not trained_on_retrieval(loaded.meta):
            log.warning(
                "%s was never trained on retrieved documents: expect no citations and few right answers; "
                "`nanochat rag_finetune --source %s` trains that", loaded.path, settings.source,
            )  # fmt: skip
        options = Options(
            settings.top_k, settings.order, settings.max_tokens_documents, settings.batch_size,
            Sampling(max_tokens=settings.longest, temperature=settings.temperature, seed=settings.seed),
            settings.reread, settings.contrast, None, settings.latency_questions, settings.seed, progress=True,
        )  # fmt: skip
        result = measure(settings, loaded, knowledge, questions, options)
    save(settings, loaded, result, new=world is not None)
    return result


def measure(
    settings: RagEvalSettings, loaded: Loaded, knowledge: Any, questions: list[RagQuestion], options: Options
) -> RagResult:
    """The conditions of the mode."""
    asked = (loaded.model, loaded.tokenizer, knowledge, questions, options)
    if settings.mode == "rag":
        return measure_rag(*asked, settings.conditions or tuple(CONDITIONS))
    hops = Hops(settings.max_hops, settings.hop_k, QUERIES[settings.query])
    return measure_refrag(*asked, hops, settings.conditions or tuple(HEADINGS))


def is_world(spec: str) -> bool:
    return spec.partition(":")[0] == "world"


def open_world_of(spec: str) -> World:
    """The world of `world:seed=7,known=200,new=400`. Raises UsageError."""
    return open_world(read_options(spec, split_spec(spec)[1], {"seed": int, "known": int, "new": int}))


def choose_questions(settings: RagEvalSettings, world: World | None) -> list[RagQuestion]:
    """The questions to ask: the first of a file; drawn by the seed from a world."""
    if world is not None:
        hops = settings.hops or ((1,) if settings.mode == "rag" else (2, 3))
        return world_questions(world, settings.max_problems or 500, settings.max_unanswerable, settings.seed, hops)
    questions = load_questions(settings.questions)
    answerable = [q for q in questions if q.answerable]
    others = [q for q in questions if not q.answerable]
    return answerable[: settings.max_problems or None] + others[: settings.max_unanswerable or None]


@contextmanager
def knowledge_of(settings: RagEvalSettings, world: World | None, questions: list[RagQuestion]) -> Iterator[Any]:
    """What is searched: the knowledge base named, one made of the world's new entities, or, where the questions bring
    their documents, None; for a model that searches on its own one made of all these. Raises NanochatError when the
    knowledge base is missing, damaged or of another version."""
    kind = settings.retriever_type or "hybrid"
    if settings.knowledge_base is not None:
        yield open_knowledge(settings.knowledge_base, settings.retriever_type or "")
    elif world is not None:
        with world_knowledge(world, kind) as knowledge:
            yield knowledge
    elif settings.mode == "refrag":
        with temporary_knowledge({d.id: d for q in questions for d in q.documents}.values(), kind) as knowledge:
            yield knowledge
    else:
        yield None


def world_knowledge(world: World, kind: str = "hybrid") -> AbstractContextManager[Any]:
    """A knowledge base of the world's new entities, one document each, in a temporary directory."""
    return temporary_knowledge((as_document(record) for record in world.documents("new")), kind)


@contextmanager
def temporary_knowledge(documents: Iterable[Document], kind: str = "hybrid") -> Iterator[Any]:
    """A knowledge base of these documents in a temporary directory."""
    from nanochat.retrieval import KnowledgeBase

    with (
        tempfile.TemporaryDirectory(prefix="nanochat-rag-") as directory,
        KnowledgeBase.create(Path(directory) / "knowledge_base", kind=kind) as knowledge,
    ):
        knowledge.add(documents)
        yield knowledge


def save(settings: RagEvalSettings, loaded: Loaded, result: RagResult, new: bool) -> Path:
    """Print the table and write the JSON file, on rank 0."""
    stage = str(loaded.meta.get("stage") or loaded.path.parent.name)
    path = loaded.path.parent.parent / f"{settings.mode}_eval_{stage}.json"
    if runtime.rank() == 0:
        about = {
            "kind": f"{settings.mode}_eval", "stage": stage, "step": loaded.meta["step"],
            "checkpoint": str(loaded.path), "questions": settings.questions, "knowledge_base": settings.knowledge_base,
            "retriever_type": settings.retriever_type, "top_k": settings.top_k, "order": settings.order,
            **({"max_hops": settings.max_hops, "hop_k": settings.hop_k} if settings.mode == "refrag" else {}),
            "seed": settings.seed, "quantize": settings.quantize,
            "conditions": {
                name: {"questions": len(c.judged), "cut": sum(j.cut for j in c.judged), "seconds": round(c.seconds, 3)}
                for name, c in result.columns.items()
            },
            "samples": result.samples(settings.samples),
        }  # fmt: skip
        write_metrics(path, result.metrics(new), **about)
    runtime.print0(f"{loaded.path}\n{result.table()}\nwritten to {path}")
    return path


def rag_eval(argv: list[str] | None = None) -> None:
    """The command `nanochat rag_eval`."""
    try:
        evaluate_rag_settings(config.parse(RagEvalSettings, argv, prog="nanochat rag_eval"))
    finally:
        runtime.finish()
