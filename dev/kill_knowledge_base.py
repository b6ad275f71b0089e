"""Kill -9 at random moments of add, update, delete, compact, index build and ingestion: is the knowledge base whole?

    python dev/kill_knowledge_base.py --kills 200

A worker changes a knowledge base, says before and after each change which one it is, and is killed: after some time,
or when it is about to open, rename, link or remove its n-th file, so that each step is met often. Then the next open
must give exactly the state before that change or after it (of an ingestion: after one of its commits), `verify` must be
clean, older versions must be what they were, searches must find what is there, and the change, made again, must come to
its end. Ends with one line; the exit code is 0 when all of that held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import KnowledgeBase
from nanochat.retrieval.staging import EMBED_AT_ONCE

KINDS = ("add", "update", "delete", "compact", "reindex", "ingest")
STEPS = ("open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "sqlite3.connect")
COMMIT_EVERY = 400  # documents of an ingestion
State = dict[str, str]  # id -> content


class Letters:
    """A small embedder: counts of letters. Writes what it embeds to a file, to see whether anything comes twice."""

    name, dimension = "letters", 26

    def __init__(self, log: Path) -> None:
        self.log = log

    def embed(self, texts: list[str]) -> np.ndarray:
        with open(self.log, "a") as file:
            file.write("".join(text.replace("\n", " ") + "\n" for text in texts))
        return self.embed_queries(texts)

    def embed_queries(self, texts: list[str]) -> np.ndarray:
        counts = np.zeros((len(texts), 26), np.float32)
        for line, text in zip(counts, texts):
            codes = np.frombuffer(text.encode(), np.uint8)
            line += np.bincount(codes[(codes >= 97) & (codes < 123)] - 97, minlength=26)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def text(draws: random.Random, id: str) -> str:
    words = " ".join("".join(draws.choices("abcdefghij", k=5)) for _ in range(draws.randrange(3, 12)))
    return f"common {words} only{id.replace('-', 'x')}"


def fresh(number: int, n: int) -> State:
    draws = random.Random(number)
    return {f"{number}-{i}": text(draws, f"{number}-{i}") for i in range(n)}


def outcomes(kind: str, number: int, state: State) -> list[State]:
    """What change `number` may leave of a state, the whole change last."""
    draws = random.Random(-number - 1)
    if kind == "add":
        return [{**state, **fresh(number, 150)}]
    if kind == "update":
        chosen = draws.sample(sorted(state), min(80, len(state)))
        return [{**state, **{id: text(draws, f"{number}-{id}") for id in chosen}, **fresh(number, 20)}]
    if kind == "delete":
        chosen = set(draws.sample(sorted(state), max(len(state) // 3, 1))) if state else set()
        return [{id: content for id, content in state.items() if id not in chosen}]
    if kind == "ingest":
        new = list(fresh(number, 3 * COMMIT_EVERY).items())
        return [{**state, **dict(new[:n])} for n in (COMMIT_EVERY, 2 * COMMIT_EVERY, 3 * COMMIT_EVERY)]
    return [state]


def change(kb: KnowledgeBase, kind: str, number: int, state: State) -> None:
    """Make change `number` to a knowledge base that holds `state`."""
    after = outcomes(kind, number, state)[-1]
    if kind == "add":
        kb.add([Document(id, content) for id, content in after.items() if id not in state])
    elif kind == "update":
        kb.update([Document(id, content) for id, content in after.items() if state.get(id) != content])
    elif kind == "delete":
        kb.delete([id for id in state if id not in after])
    elif kind == "compact":
        kb.compact(keep=2)
    elif kind == "reindex":
        kb.reindex()
    else:
        path = kb.path.parent / "documents.jsonl"
        records = [{"id": id, "content": content} for id, content in fresh(number, 3 * COMMIT_EVERY).items()]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        kb.ingest(path, commit_every=COMMIT_EVERY, progress=False)


def content(kb: KnowledgeBase) -> State:
    return {document.id: document.content for document in kb.documents()}


def work(root: Path, kind: str, number: int, steps: int) -> None:
    """Change the knowledge base again and again, each time saying so, until killed; after `steps` of them by itself."""
    kb, done = open_there(root), [0]

    def step(event: str, _: object) -> None:
        if done[0] >= 0 and event in STEPS:
            done[0] += 1
            if done[0] == steps:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(step)
    while True:
        state, before = content(kb), done[0]
        print("begin", flush=True)
        change(kb, kind, number, state)
        print(f"done {done[0] - before}", flush=True)
        number += 1


def open_there(root: Path) -> KnowledgeBase:
    kind = json.loads((root / "kind.json").read_text())
    embedder = Letters(root / "embedded.txt") if kind in ("dense", "hybrid") else None
    if (root / "kb" / "manifest.json").exists():
        return KnowledgeBase.open(root / "kb", embedder=embedder)
    return KnowledgeBase.create(root / "kb", kind=kind, embedder=embedder)


class Trial:
    """One knowledge base, what should be in it, and in its older versions."""

    def __init__(self, root: Path, kind: str, seed: int) -> None:
        self.root, self.draws = root, random.Random(seed)
        (root / "kind.json").write_text(json.dumps(kind))
        self.state: State = {}
        self.versions: dict[int, State] = {0: {}}
        self.number = 0
        self.seconds = dict.fromkeys(KINDS, 0.5)  # that a change takes, roughly
        self.steps = dict.fromkeys(KINDS, 40.0)
        self.kills: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.wrong: list[str] = []
        open_there(root).close()

    def kill_once(self) -> None:
        kind = self.draws.choice(KINDS)
        if kind in ("delete", "update", "compact") and len(self.state) < 100:
            kind = "add"
        if len(self.state) > 3000:
            kind = "delete"
        after, steps = self.draws.uniform(0, 1.5 * self.seconds[kind]), 0
        if self.draws.random() < 0.5:
            after, steps = 30.0, 1 + int(self.draws.uniform(0, 1.2 * self.steps[kind]))
        command = [sys.executable, __file__, "--work", str(self.root), kind, str(self.number), str(steps)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            if worker.stdout.readline() != "begin\n":
                raise SystemExit(f"the worker did not begin: exit code {worker.wait()}")
            began = time.time()
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(after)
            worker.kill()
            said = worker.stdout.read().split()
        if worker.returncode != -signal.SIGKILL:
            raise SystemExit(f"the worker failed with exit code {worker.returncode}")
        n_done = said.count("done")
        if n_done:
            self.seconds[kind] = 0.5 * self.seconds[kind] + 0.5 * (time.time() - began) / n_done
            self.steps[kind] = float(said[-2] if said[-1] == "begin" else said[-1])
        self.kills[kind] += 1
        for _ in range(n_done):
            self.state = outcomes(kind, self.number, self.state)[-1]
            self.number += 1
        # The worker died in change `number`, or between two.
        self.check(kind, [self.state, *outcomes(kind, self.number, self.state)])
        self.number += 1

    def check(self, kind: str, possible: list[State]) -> None:
        with open_there(self.root) as kb:
            self.expect(kb.verify() == [], f"{kind}: verify says {kb.verify()}")
            found = content(kb)
            self.expect(found in possible, f"{kind} {self.number}: {len(found)} documents, neither before nor after")
            self.expect(len(kb) == len(found), f"{kind}: counts {len(kb)} documents, holds {len(found)}")
            self.left["after" if found == possible[-1] != possible[0] else "before"] += 1
            self.search(kb, found)
            for version in kb.versions():
                with kb.at(version.number) as old:
                    state = content(old)
                    known = self.versions.setdefault(version.number, state)
                    self.expect(state == known, f"{kind}: version {version.number} has changed")
            known = {version.number for version in kb.versions()}
            self.versions = {number: state for number, state in self.versions.items() if number in known}
            before = self.embedded()
            change(kb, kind, self.number, possible[0])  # again, to its end
            self.state = content(kb)
            complete = self.state == outcomes(kind, self.number, possible[0])[-1]
            self.expect(complete, f"{kind}: made again, it left {len(self.state)} documents")
            twice = len(set(before) & set(self.embedded()[len(before) :])) if kind == "ingest" else 0
            self.expect(twice <= EMBED_AT_ONCE, f"{twice} texts were embedded twice")  # what was being embedded then
            self.expect(kb.verify() == [], f"{kind}, made again: verify says {kb.verify()}")
            self.versions[kb.version] = self.state

    def search(self, kb: KnowledgeBase, found: State) -> None:
        mode = "bm25" if kb.kind == "hybrid" else None
        hits = kb.search("common", k=10_000, mode=mode)
        self.expect({hit.id: hit.document.content for hit in hits} == found, "a search for all finds something else")
        for id in self.draws.sample(sorted(found), min(3, len(found))):
            best = kb.search(found[id], k=1, mode=mode)
            self.expect(bool(best) and best[0].document.content == found[id], f"a search does not find {id}")

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)
            print(f"WRONG: {what}", flush=True)

    def embedded(self) -> list[str]:
        path = self.root / "embedded.txt"
        return path.read_text().splitlines() if path.exists() else []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kind", default="hybrid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", nargs=4, metavar=("ROOT", "KIND", "NUMBER", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        root, kind, number, steps = options.work
        work(Path(root), kind, int(number), int(steps))
    began = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch), options.kind, options.seed)
        while trial.kills.total() < options.kills and not trial.wrong:
            trial.kill_once()
            if trial.kills.total() % 20 == 0:
                done = f"{trial.kills.total()} kills, version {max(trial.versions)}, {len(trial.state)} documents"
                print(done, flush=True)
    kills = ", ".join(f"{kind} {n}" for kind, n in sorted(trial.kills.items()))
    print(
        f"kill_knowledge_base: {options.kind}, {trial.kills.total()} kills ({kills}); {trial.left['after']} left the "
        f"change whole, {trial.left['before']} the state before it or a part that was committed; {len(trial.wrong)} "
        f"wrong, {time.time() - began:.0f} s"
    )
    return int(bool(trial.wrong))


if __name__ == "__main__":
    sys.exit(main())
