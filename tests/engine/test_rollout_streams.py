"""Random numbers of rollouts: shared by prompts, or each prompt's own."""

from test_generate import TOKENIZER, build, prompts

from nanochat.engine.rollout import rollouts
from nanochat.engine.sampling import Sampling


def test_prompts_share_their_luck_unless_they_have_streams_of_their_own():
    model = build("T")
    same = prompts(1) * 4
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=3)

    def said(**options):
        return [tuple(one.ids) for one in rollouts(model, TOKENIZER, same, sampling, 2, **options)]

    shared = said()
    assert shared[:2] * 4 == shared
    own = said(streams=[0, 1, 2, 3])
    assert own[:2] == shared[:2]
    assert len(set(own)) == 8
    assert said(streams=[2, 0, 3, 1]) == [x for i in (2, 0, 3, 1) for x in own[2 * i : 2 * i + 2]]
