"""Rollouts against the plainest way to make them, with models of every kind; and with puppets, row by row."""

import pytest
import torch
from puppet import Puppet
from test_generate import PATTERNS, TOKENIZER, build, prompts

from nanochat.engine.prefix import PrefixCache
from nanochat.engine.rollout import rollouts, steps
from nanochat.engine.sampling import Sampling
from nanochat.engine.tools import Calculator, Request, Result
from nanochat.errors import NanochatError, UsageError

START, END = TOKENIZER.special("tool_call_start"), TOKENIZER.special("tool_call_end")
EOT = TOKENIZER.eot
BEGIN = 200  # the last token of a puppet's prompt


class Echo:
    """Gives back what it was asked, and notes how many asked at once."""

    name, start, end = "echo", "tool_call_start", "tool_call_end"

    def __init__(self, last=False):
        self.batches, self.last = [], last

    def run(self, requests):
        self.batches.append(len(requests))
        for request in requests:
            if request.text == "boom":
                raise ZeroDivisionError("boom")
        parts = [[{"type": "tool_output", "text": f"{r.text}!"}] for r in requests]
        return [Result(part, r.text, self.last) for part, r in zip(parts, requests)]


def script(*segments):
    """A puppet's policy: the prompt's first token chooses the script; it goes on after each result."""

    def policy(ids):
        last = max((i for i, token in enumerate(ids) if token == TOKENIZER.special("tool_output_end")), default=None)
        turn = ids.count(TOKENIZER.special("tool_output_end"))
        begun = (last if last is not None else ids.index(BEGIN)) + 1
        wanted = segments[ids[0]]
        said = wanted[min(turn, len(wanted) - 1)]
        return said[min(len(ids) - begun, len(said) - 1)]

    return policy


def call(text):
    return [START, *text.encode(), END]


def roll(policy, n_prompts, tool=None, max_tokens=100, sequence_len=1000, broken=lambda ids: False, n=1, **options):
    model = Puppet(TOKENIZER.vocab_size, policy, sequence_len, broken)
    tools = [tool if tool is not None else Echo()]
    given = [[i, *[5] * (3 * i), BEGIN] for i in range(n_prompts)]
    return model, rollouts(model, TOKENIZER, given, Sampling(max_tokens, 0.0), n, tools, **options)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_sampled_has_the_models_probability_and_results_are_the_tools(pattern):
    model = build(pattern, sequence_len=400)
    plain, bias = model.logits, torch.zeros(TOKENIZER.vocab_size)
    bias[START], bias[END] = 3.0, 4.5
    model.logits = lambda hidden: plain(hidden) + bias
    sampling, given = Sampling(max_tokens=60, temperature=1.0, seed=1), prompts(5, longest=30)
    found = rollouts(model, TOKENIZER, given, sampling, 2, [Calculator()], 4, max_call_tokens=30)
    assert sum(len(one.calls) for one in found) > 4
    assert {one.finish_reason for one in found} > {"length"}
    for one, prompt in zip(found, [p for p in given for _ in range(2)]):
        assert one.prompt == prompt
        assert len(one.ids) == len(one.sampled) == len(one.logprobs)
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([[*prompt, *one.ids]])))[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
        sampled = torch.tensor(one.sampled)
        torch.testing.assert_close(torch.tensor(one.logprobs)[sampled], expected[sampled], atol=1e-4, rtol=0)
        assert not torch.tensor(one.logprobs)[~sampled].any()
        inside = [False] * len(one.ids)
        for each in one.calls:
            block = slice(each.at, each.at + each.n_tokens)
            inside[block] = [True] * each.n_tokens
            assert one.ids[each.at - 1] == END
            answer = Calculator().run([Request(each.text)])[0]
            assert one.ids[block] == TOKENIZER.render_parts(answer.parts).ids
            assert each.result == answer.value
        assert [not each for each in inside] == one.sampled
    few = rollouts(model, TOKENIZER, given, sampling, 2, [Calculator()], 4, max_call_tokens=30, max_rows=3)
    assert [one.ids for one in few] == [one.ids for one in found]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_prefix_cache_changes_nothing(pattern):
    model, cache = build(pattern, sequence_len=400), PrefixCache(spacing=4)
    said = [TOKENIZER.render_prompt({"messages": [{"role": "user", "content": "Hello"}]}).ids]
    said.append([*said[0], *b"Hi.", EOT, *said[0][1:]])
    for given in said:
        plain = rollouts(model, TOKENIZER, [given], Sampling(12, 0.0), 2)
        assert [one.ids for one in rollouts(model, TOKENIZER, [given], Sampling(12, 0.0), 2, prefix_cache=cache)] == [
            one.ids for one in plain
        ]
    assert cache.tokens_saved == len(said[0]) - 1


def test_nothing_is_read_twice_and_calls_go_together():
    plan = [[call("a"), call("bb"), [65, EOT]], [call("ccc"), [EOT]], [[66, 67, EOT]]]
    tool = Echo()
    model, found = roll(script(*plan), 3, tool, n=2)
    assert [one.ids[-1] for one in found] == [EOT] * 6
    assert [[c.text for c in one.calls] for one in found[::2]] == [["a", "bb"], ["ccc"], []]
    for one in found:
        assert all(bytes(one.ids[c.at + 1 : c.at + c.n_tokens - 1]) == f"{c.text}!".encode() for c in one.calls)
    read = sum(len(one.prompt) for one in found[::2]) + sum(len(one.ids) - 1 for one in found)
    assert model.n_read == read  # all but each row's last token, once; prompts once for both samples
    assert sum(tool.batches) == sum(len(one.calls) for one in found)
    late = Echo()
    roll(script([call("a"), [EOT]], *[[call("bb"), [EOT]]] * 5), 6, late)
    assert late.batches == [6]  # the first to ask waits for the others


def test_steps_are_the_rollouts_piece_by_piece():
    model = Puppet(TOKENIZER.vocab_size, script([call("a"), [65, EOT]], [[66, EOT]]))
    rows = {0: [], 1: []}
    finished = {}
    for some in steps(model, TOKENIZER, [[0, BEGIN], [1, BEGIN]], Sampling(50, 0.0), 1, [Echo()]):
        for step in some:
            rows[step.row] += [(i, step.sampled) for i in step.ids]
            if step.finished:
                finished[step.row] = step.finished
    for i, one in finished.items():
        assert rows[i] == list(zip(one.ids, one.sampled))


@pytest.mark.parametrize("max_calls", [0, 1, 2])
def test_a_row_that_wants_one_call_too_many_ends_or_must_answer(max_calls):
    policy = script([call("a")] * 9)
    _, (ended,) = roll(policy, 1, max_calls=max_calls)
    assert (ended.finish_reason, len(ended.calls), ended.ids[-1]) == ("calls", max_calls, START)
    _, (forced,) = roll(policy, 1, max_calls=max_calls, at_limit="forbid", max_tokens=20)
    assert len(forced.calls) == max_calls
    assert forced.ids.count(START) == max_calls
    assert forced.finish_reason == "length"


def test_a_result_that_is_the_last_leaves_no_call():
    _, (one,) = roll(script([call("a")] * 9), 1, Echo(last=True))
    assert (one.finish_reason, len(one.calls)) == ("calls", 1)


def test_one_row_fails_and_the_others_go_on():
    plan = [[call("a"), [EOT]], [call("boom"), [EOT]], [[START, *b"x" * 90]], [[65, EOT]], [[START, 65, EOT]]]
    _, found = roll(script(*plan), 5, broken=lambda ids: ids[0] == 3 and ids[-1] == 65)
    assert [one.finish_reason for one in found] == ["stop", "error", "error", "error", "stop"]
    assert "echo failed on 'boom': ZeroDivisionError" in found[1].error
    assert "more than 64 tokens" in found[2].error
    assert "not finite" in found[3].error
    assert len(found[4].calls) == 0
    assert all(len(one.ids) == len(one.sampled) == len(one.logprobs) for one in found)
    model = Puppet(TOKENIZER.vocab_size, script([[65, EOT]]), 10)
    bad = rollouts(model, TOKENIZER, [[], [0, BEGIN], [5] * 11], Sampling(5, 0.0))
    assert [one.finish_reason for one in bad] == ["error", "stop", "error"]
    assert "empty" in bad[0].error
    assert "11 tokens" in bad[2].error


@pytest.mark.parametrize("answers", [[], [Result([{"type": "nonsense", "text": ""}])], [Result([{"type": "text"}])]])
def test_a_tool_that_breaks_its_contract_ends_its_rows(answers):
    class Broken(Echo):
        def run(self, requests):
            return answers

    _, (one,) = roll(script([call("a"), [EOT]]), 1, Broken())
    assert one.finish_reason == "error"
    assert one.error.startswith("echo failed on 'a'")


def test_failures_of_the_project_keep_their_message():
    class Broken(Echo):
        def run(self, requests):
            raise NanochatError("the knowledge base is gone")

    _, (one,) = roll(script([call("a"), [EOT]]), 1, Broken())
    assert one.error.endswith("the knowledge base is gone")


def test_lengths_are_kept():
    long = [[call("y" * 40)] * 9]
    _, (cut,) = roll(script(*long), 1, max_result_tokens=20)
    assert [c.n_tokens for c in cut.calls] == [20, 20]  # a third call would be the 101st token
    assert cut.finish_reason == "length"
    assert sum(cut.sampled) == 100
    _, (full,) = roll(script(*long), 1, max_tokens=1000, sequence_len=200, max_calls=9)
    assert full.finish_reason == "length"
    assert len(full.prompt) + len(full.ids) == 201  # the last token sampled is not fed back
    _, (unasked,) = roll(script([call("abc")]), 1, max_tokens=5)
    assert (unasked.finish_reason, unasked.calls) == ("length", ())


def test_what_the_tool_is_told():
    seen = []

    class Nosy(Echo):
        def run(self, requests):
            seen.extend(requests)
            return super().run(requests)

    special = TOKENIZER.special("cite_start")
    plan = [[[START, *b" a", special, *b"b ", END], call("c"), [EOT]], [call("d"), [EOT]]]
    roll(script(*plan), 2, Nosy(), max_result_tokens=50)
    assert [(r.text, r.prompt, len(r.earlier)) for r in seen] == [("d", 1, 0), ("ab", 0, 0), ("c", 0, 1)]
    assert all(r.max_tokens == 50 for r in seen)
    assert seen[-1].earlier[0].text == "ab"


def test_wrong_calls_are_refused():
    model = Puppet(TOKENIZER.vocab_size, script([[EOT]]))
    for options, message in (
        ({"max_calls": -1}, "max_calls=-1"),
        ({"max_result_tokens": 2}, "max_result_tokens=2"),
        ({"at_limit": "beg"}, "at_limit='beg'"),
        ({"n": 0}, "n=0"),
        ({"tools": [Echo(), Echo()]}, "two tools"),
        ({"sampling": Sampling(stop="x")}, "stop strings"),
    ):
        with pytest.raises(UsageError, match=message):
            rollouts(model, TOKENIZER, [[0, BEGIN]], **options)
    assert rollouts(model, TOKENIZER, []) == []
