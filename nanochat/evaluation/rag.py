"""How well a model answers from documents: one set of questions under five conditions.

closed_book    the question alone
rag            with the documents that a search finds (or those that the question brings)
rag_gold       with the documents that state the answer, and no others
rag_shuffled   with documents found for another question: who still answers, does not read
no_documents   with an empty block of documents

and, by `refrag.py`, where the model searches on its own before it answers: refrag, refrag_shuffled.

What is counted, a question at a time:

right          `grading.is_right`: the gold answer, or a sentence that restates it and names nothing else
abstained      the answer begins with the abstention token, or is the sentence that stands for it
hallucinated   an answer was given instead of an abstention, and it is wrong (any answer is, where nothing answers the
               question), or no document of the prompt states it: no gold one is there, or, where gold documents are
               not known, none that holds the answer's words. Closed book only wrong answers count. Silence is wrong.
citations      a citation is right when the answer is, and it names a gold document (or, where these are not known, one
               that holds the answer). Precision: of all citations made, those that name no document included; recall:
               sentences of given answers with a right citation, as in ALCE (Gao et al. 2023, arXiv 2305.14627)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm import tqdm

from nanochat import runtime
from nanochat.data.answers import contains_answer, is_abstention
from nanochat.data.shuffle import Draws, mix
from nanochat.engine.generate import Engine
from nanochat.engine.sampling import Sampling
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation.chat import gather, slices
from nanochat.evaluation.grading import answer_f1, is_right
from nanochat.evaluation.rag_questions import (
    check_questions,
    gold_documents,
    prompt_tokens,
    with_own_ids,
)
from nanochat.evaluation.rag_result import CONDITIONS, HEADINGS, SEARCHING, Column, Judged, RagResult, summarize
from nanochat.intervals import Metric, exact
from nanochat.model.lm import LM
from nanochat.rag import support
from nanochat.rag.citations import ABSTAINED, Answer, parse
from nanochat.rag.grounded import to_reread
from nanochat.rag.knowledge import Searcher
from nanochat.rag.prompt import focused, headings, retrieval_message
from nanochat.rag.questions import RagQuestion
from nanochat.retrieval.document import Document, Embedder
from nanochat.runtime import log
from nanochat.tokenizer import Tokenizer

UNANSWERABLE_TOO = ("closed_book", "rag", "refrag")  # the others ask what the absence or presence of the answer changes
GREEDY = Sampling(max_tokens=64, temperature=0.0)


@dataclass(frozen=True)
class Options:
    """How documents get into prompts, and how answers are generated."""

    top_k: int = 5
    order: str = "shuffled"  # best first, the gold document is nearly always number 1, and citing that no skill
    max_tokens_documents: int = 0  # 0: all the room that question and answer leave
    batch_size: int = 32
    sampling: Sampling = GREEDY
    reread: bool = True  # answer twice, the second time from the documents that the first answer cites (rag.grounded)
    contrast: bool = False  # measure the hallucination score with the model's contrast too (two more passes an answer)
    embedder: Embedder | None = None  # and with embeddings
    n_latency: int = 10  # questions that are answered one at a time, with a clock
    seed: int = 0
    progress: bool = False


class Prepared(NamedTuple):
    """A question as the model gets it."""

    question: RagQuestion
    messages: list[dict[str, Any]]
    ids: list[int]
    documents: tuple[Document, ...]
    cut: bool  # documents were shortened or left out to fit
    seconds: float  # of the search


def evaluate_rag(
    model: LM,
    tokenizer: Tokenizer,
    knowledge: Searcher | None,
    questions: Sequence[RagQuestion],
    top_k: int = 5,
    *,
    conditions: Sequence[str] = tuple(CONDITIONS),
    new: bool = True,
    **options: Any,
) -> dict[str, Metric]:
    """The metrics of `measure_rag` under flat names. Options: the fields of `Options`."""
    return measure_rag(model, tokenizer, knowledge, questions, Options(top_k, **options), conditions).metrics(new)


def measure_rag(
    model: LM,
    tokenizer: Tokenizer,
    knowledge: Searcher | None,
    questions: Sequence[RagQuestion],
    options: Options = Options(),
    conditions: Sequence[str] = tuple(CONDITIONS),
    asker: Callable[..., Asker] | None = None,
) -> RagResult:
    """Ask all questions under the conditions. Questions that nothing answers are asked closed book and with RAG only.

    knowledge: what is searched; None: each question brings its documents. asker: puts the questions (default: `Asker`).
    Under torchrun each rank takes its share of the questions and gets the result of all. Everything is checked before
    the model generates: raises UsageError for questions that cannot be asked, NanochatError when no question finds any
    document."""
    known = CONDITIONS if asker is None else HEADINGS
    for name in conditions:
        if name not in known:
            raise UsageError(f"unknown condition {name!r}: there is {', '.join(known)}")
    if options.top_k < 1:
        raise UsageError(f"--top_k {options.top_k}: must be at least 1")
    room = min(options.sampling.max_tokens, model.config.sequence_len // 4)
    check_questions(questions, knowledge, tokenizer, model.config.sequence_len, room)
    if knowledge is None:
        questions = [with_own_ids(question) for question in questions]
    asking = (asker or Asker)(model, tokenizer, knowledge, questions, options, room)
    multihop = not SEARCHING.keys().isdisjoint(conditions)
    return RagResult({c: asking.column(c) for c in known if c in conditions}, multihop)


class Asker:
    """Puts the questions to the model, each condition its own way."""

    def __init__(
        self, model: LM, tokenizer: Tokenizer, knowledge: Any, questions: Sequence[RagQuestion], options: Options,
        room: int,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.knowledge, self.options = model, tokenizer, knowledge, options
        self.questions, self.room = list(questions), room
        self.engine = Engine(model, tokenizer, max_rows=options.batch_size)
        self.found, self.seconds = self.search()

    def search(self) -> tuple[list[list[Document]], list[float]]:
        """The documents for each question, and how long each search took (one at a time)."""
        if self.knowledge is None:
            return [list(question.documents) for question in self.questions], [0.0] * len(self.questions)
        found, seconds = [], []
        for question in self.questions:
            began = time.perf_counter()
            hits = self.knowledge.search([question.question], self.options.top_k)[0]
            seconds.append(time.perf_counter() - began)
            found.append([hit.document for hit in hits])
        nothing = sum(not documents for documents in found)
        if nothing == len(found):
            raise NanochatError(
                f"the knowledge base finds no document for any of the {nothing} questions: is it the right one?"
            )
        if nothing:
            log.warning("%d of %d questions find no document; they are asked with an empty block", nothing, len(found))
        return found, seconds

    def column(self, condition: str) -> Column:
        """Ask, judge, sum up."""
        too = condition in UNANSWERABLE_TOO
        numbers = [i for i, q in enumerate(self.questions) if q.answerable or too]
        if condition == "rag_gold":
            numbers = [i for i in numbers if self.questions[i].gold]
        if not numbers:
            return Column({}, [])
        rank, world = runtime.rank(), runtime.world_size()
        mine = numbers[rank::world]
        bar = tqdm(total=len(mine), desc=HEADINGS[condition], unit="question",
                   disable=not self.options.progress or rank > 0)  # fmt: skip
        began = time.perf_counter()
        judged: list[Judged] = []
        with bar:
            for some in slices(mine, 4 * self.options.batch_size):
                judged += self.ask(condition, some)
                bar.update(len(some))
        seconds = time.perf_counter() - began
        everyone = sorted(gather(judged), key=lambda j: j.number)
        n_cut = sum(j.cut for j in everyone)
        if n_cut:
            log.warning("%s: in %d of %d prompts documents were shortened or left out to fit",
                        HEADINGS[condition], n_cut, len(everyone))  # fmt: skip
        metrics = summarize(everyone, condition, self.options.seed)
        return Column(metrics | self.latency(condition, numbers), everyone, seconds)

    def ask(self, condition: str, numbers: Sequence[int]) -> Iterator[Judged]:
        prepared = [self.prepare(condition, i) for i in numbers]
        for i, p, answer in zip(numbers, prepared, self.answers(prepared)):
            yield self.judge(condition, i, p, answer)

    def answers(self, prepared: Sequence[Prepared]) -> list[Answer]:
        """What the model says, after a draft where it reads again."""
        found = self.read([p.ids for p in prepared], prepared)
        if not self.options.reread:
            return found
        again = [i for i, p in enumerate(prepared) if to_reread(found[i], len(p.documents))]
        prompts = []
        for i in again:
            shown = [
                focused(message, found[i].citations) if message["role"] == "retrieval" else message
                for message in prepared[i].messages
            ]
            prompts.append(self.tokenizer.render_prompt({"messages": shown}).ids)
        said = dict(zip(again, self.read(prompts, [prepared[i] for i in again])))
        return [said.get(i) or (ABSTAINED if draft.unfounded else draft) for i, draft in enumerate(found)]

    def read(self, prompts: Sequence[Sequence[int]], prepared: Sequence[Prepared]) -> list[Answer]:
        """An answer to each prompt, about the documents that were prepared for it."""
        completions = self.engine.generate_batch(prompts, self.options.sampling)
        return [parse(c.ids, self.tokenizer, headings(p.documents)) for c, p in zip(completions, prepared)]

    def prepare(self, condition: str, number: int) -> Prepared:
        """The prompt of a question under a condition."""
        question = self.questions[number]
        user = {"role": "user", "content": question.question}
        limit = self.model.config.sequence_len - self.room
        if condition == "closed_book":
            rendered = self.tokenizer.render_prompt({"messages": [user]}, limit)
            return Prepared(question, [user], rendered.ids, (), False, 0.0)
        budget = limit - prompt_tokens(question, self.tokenizer)
        if self.options.max_tokens_documents:
            budget = min(budget, self.options.max_tokens_documents)
        documents = self.documents(condition, number)
        block = retrieval_message(documents, self.tokenizer, budget, self.options.order, mix(self.options.seed, number))
        messages = [block.message, user]
        rendered = self.tokenizer.render_prompt({"messages": messages}, limit)
        cut = bool(block.trimmed or block.dropped or rendered.truncated_tokens or rendered.dropped_turns)
        seconds = self.seconds[number] if condition == "rag" else 0.0
        return Prepared(question, messages, rendered.ids, block.documents, cut, seconds)

    def documents(self, condition: str, number: int) -> list[Document]:
        """What the prompt shows."""
        question = self.questions[number]
        if condition == "rag":
            return self.found[number]
        if condition == "rag_gold":
            return gold_documents(question, self.knowledge)
        if condition == "no_documents":
            return []
        own = {d.text for d in gold_documents(question, self.knowledge)}
        for other in self.others(number):
            wrong = [d for d in self.found[other] if d.id not in question.gold and d.text not in own]
            if wrong:
                return wrong
        return [d for d in self.found[number] if d.id not in question.gold and d.text not in own]

    def others(self, number: int) -> Iterator[int]:
        """Other questions, by lot."""
        draws = Draws(mix(mix(0x5417, self.options.seed), number))
        for _ in range(50):
            other = draws.below(len(self.questions))
            if other != number:
                yield other

    def judge(self, condition: str, number: int, p: Prepared, answer: Answer) -> Judged:
        q, text = p.question, answer.text
        sentences = (q.sentence,) if q.answerable and q.sentence else ()
        evidence = [line for d in gold_documents(q, self.knowledge) for line in support.sentences(d.text)]
        abstained = answer.abstained or is_abstention(text)
        right = not abstained and is_right(
            text, q.answers, question=q.question, sentences=sentences, evidence=evidence
        )
        f1 = 1.0 if right else 0.0 if abstained else answer_f1(text, q.answers, q.question)
        holding = {i for i, d in enumerate(p.documents, 1) if any(contains_answer(d.text, a) for a in q.answers)}
        gold = {i for i, d in enumerate(p.documents, 1) if d.id in q.gold}
        stating = gold if q.gold else holding
        cited = [n for sentence in answer.sentences for n in sentence.cited]
        good = stating if right else set()
        rests_on = cited or range(1, len(p.documents) + 1)  # as rag.support sees it
        return Judged(
            number=number, question=q, answer=answer.render() or text, right=right, f1=f1, abstained=abstained,
            documents=tuple(d.title or d.id for d in p.documents),
            hallucinated=not abstained and not (right and (condition == "closed_book" or bool(stating))),
            citations=0 if abstained else len(cited) + len(answer.invalid),
            right_citations=sum(n in good for n in cited),
            sentences=0 if abstained else len(answer.sentences),
            cited_sentences=sum(not good.isdisjoint(s.cited) for s in answer.sentences),
            gold_found=len({p.documents[i - 1].id for i in gold}), first=1 in stating, answer_found=bool(holding),
            supported=not good.isdisjoint(rests_on), score=self.score(p, answer), cut=p.cut,
        )  # fmt: skip

    def score(self, p: Prepared, answer: Answer) -> float:
        """The hallucination score that rag.support gives, without knowing the gold answer."""
        if not p.documents:
            return 0.0 if answer.abstained else 1.0
        more: dict[str, Any] = {}
        if self.options.contrast and p.messages[0]["role"] == "retrieval":  # documents in front of the question
            more = {"model": self.model, "tokenizer": self.tokenizer, "messages": p.messages}
        return support.hallucination_score(
            answer, p.documents, question=p.question.question, embedder=self.options.embedder, **more
        )

    def latency(self, condition: str, numbers: Sequence[int]) -> dict[str, Metric]:
        """Median milliseconds of a question from prompt to answer, one at a time; with RAG the search counts too."""
        some = numbers[: self.options.n_latency]
        if not some:
            return {}
        times = []
        for i in some:
            began = time.perf_counter()
            prepared = self.prepare(condition, i)
            self.answers([prepared])
            times.append(time.perf_counter() - began + prepared.seconds)
        found = {"latency_ms": exact(1e3 * statistics.median(times), len(times))}
        if condition == "rag" and self.knowledge is not None:
            found["retrieval_ms"] = exact(1e3 * statistics.median(self.seconds), len(self.seconds))
        return found
