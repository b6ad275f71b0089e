"""Support of sentences: hand-made cases, a naive oracle for contrast, calibration against its own definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.world import World
from nanochat.errors import UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.rag import calibration as cal
from nanochat.rag import support as sup
from nanochat.rag.calibration import Weights, fit, probability, reliability, world_examples
from nanochat.rag.citations import Answer, Sentence
from nanochat.rag.prompt import retrieval_message
from nanochat.retrieval.document import Document
from nanochat.tokenizer import Tokenizer

MARA = Document(
    "1", "Mara Velt was born in Torwick. She plays the oboe. Her salary rose to 1,604 in 1999. She never eats fish.",
    "Mara Velt",
)  # fmt: skip
BRAM = Document("2", "Bram Cobb was born in Brimholt. Bram Cobb taught Mara Velt.", "Bram Cobb")
TOWN = Document("3", "Torwick lies on the river Lenn.", "Torwick")
BORN = "Where was Mara Velt born?"


def lexical(sentence, *documents, question=""):
    return sup.lexical_support(sentence, documents or (MARA,), question)


# ---- lexical


@pytest.mark.parametrize("sentence", ["Mara Velt was born in Torwick.", "She plays the oboe.", "She never eats fish."])
def test_what_a_document_says_word_for_word_has_support_1(sentence):
    assert lexical(sentence) == pytest.approx(1.0)
    assert lexical(sentence, BRAM, MARA) == pytest.approx(1.0)


def test_the_title_stands_for_the_pronoun():
    assert lexical("Mara Velt plays the oboe.") > 0.95


@pytest.mark.parametrize(
    ("true", "false", "question"),
    [
        ("Mara Velt was born in Torwick.", "Mara Velt was born in Brimholt.", ""),
        ("Mara Velt was born in Torwick.", "Bram Cobb was born in Torwick.", ""),
        ("Mara Velt was born in Torwick.", "Mara Velt was not born in Torwick.", ""),
        ("She never eats fish.", "She eats fish.", ""),
        ("Her salary rose to 1604.", "Her salary rose to 1614.", ""),
        ("Mara Velt plays the oboe.", "Mara Velt plays the harp.", "Which instrument does Mara Velt play?"),
    ],
)
def test_false_sentences_score_below_true_ones(true, false, question):
    assert lexical(true, question=question) > 0.6
    assert lexical(false, question=question) < lexical(true, question=question) - 0.2


def test_order_matters_a_little():
    assert 0.7 <= lexical("Mara Velt taught Bram Cobb.", BRAM) < lexical("Bram Cobb taught Mara Velt.", BRAM)


def test_what_the_answer_adds_to_the_question_has_to_come_from_somewhere():
    asked = "Which instrument does Mara Velt play?"
    assert lexical("Mara Velt plays the harp.", question=asked) == 0.0
    assert lexical("Mara Velt plays the harp.") > 0.7
    assert lexical("Mara Velt plays the oboe.", question=asked) > 0.9


def test_names_are_not_common_words():
    mill = Document("1", "The works stand by a mill in Yarstow.", "")
    assert lexical("Yarstow has the Golden Mill Works.", mill) < 0.3


def test_a_word_said_twice_has_to_be_there_twice():
    asked = "Who is the best friend of Bram Cobb?"
    friend = Document("1", "The best friend of Bram Cobb is Mara Velt. Bram Cobb plays.", "Bram Cobb")
    assert lexical("The best friend of Bram Cobb is Bram Cobb.", friend, question=asked) < 0.7
    assert lexical("The best friend of Bram Cobb is Mara Velt.", friend, question=asked) == pytest.approx(1.0)


def test_documents_that_share_a_name_count_together_and_others_do_not():
    chain = "Mara Velt was born in Torwick, which lies on the river Lenn."
    assert lexical(chain, MARA, TOWN) > max(lexical(chain, MARA), lexical(chain, TOWN)) + 0.2
    claim = "Mara Velt was born in Brimholt."
    apart = Document("2", "Bram Cobb was born in Brimholt.", "Bram Cobb")
    assert lexical(claim, MARA, apart) == max(lexical(claim, MARA), lexical(claim, apart))


def test_nothing_supports_nothing():
    assert sup.lexical_support("Mara.", []) == 0.0
    assert lexical("") == lexical("…") == 0.0
    assert lexical("Mara Velt.", Document("1", "", "")) == 0.0


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60), st.text(max_size=80), st.text(max_size=20), st.text(max_size=30))
def test_any_text_has_a_support_between_0_and_1(sentence, content, title, question):
    assert 0.0 <= sup.lexical_support(sentence, [Document("1", content, title)], question) <= 1.0


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1 << 30), st.integers(10, 49), st.integers(0, 1 << 20))
def test_every_sentence_of_the_world_is_supported_by_its_document(seed, entity, wording):
    world = World(seed, 10, 40)
    record = world.document(entity, wording)
    document = Document(record["id"], record["content"], record["title"])
    for sentence in world.statements(entity, wording).values():
        assert lexical(sentence, document) == pytest.approx(1.0)


# ---- embedding


class Letters:
    """Embeds a text as its letter counts."""

    name, dimension = "letters", 26

    def embed(self, texts):
        counts = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)

    embed_queries = embed


def test_embedding_support_is_the_cosine_with_the_nearest_passage():
    letters = Letters()
    near, far = Document("1", "abc abc. xyz xyz."), Document("2", "qqq")
    assert sup.embedding_support("abc", [far, near], letters) == pytest.approx(1.0)
    assert sup.embedding_support("abc", [far], letters) == pytest.approx(0.0)
    assert sup.embedding_support("abc", [], letters) == 0.0


# ---- contrast


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([MARA.text, BRAM.text, TOWN.text], 320)


@pytest.fixture(scope="module", params=["T", "M", "M2"])
def model(request, tokenizer):
    shape = {"depth": 2, "d_model": 32, "n_head": 2, "pattern": request.param, "sequence_len": 256}
    model = LM.build(ModelConfig(vocab_size=tokenizer.vocab_size, **shape), seed=0)
    with torch.no_grad():
        model.head.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(0))
    return model.eval()


def log_probability(model, prompt, answer):
    """The oracle: a pass of its own for every token."""
    found = []
    for i, token in enumerate(answer):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([[*prompt, *answer[:i]]])))[0, -1]
        found.append(float(torch.log_softmax(logits.float(), -1)[token]))
    return found


def test_contrast_is_the_mean_gain_of_the_text_tokens(model, tokenizer):
    with_, without = tokenizer.encode(MARA.text, bos=True), tokenizer.encode("Where?", bos=True)
    cite = [tokenizer.special("cite_start"), *tokenizer.encode("1"), tokenizer.special("cite_end")]
    answer = [*cite, *tokenizer.encode("Torwick.")]
    after, before = log_probability(model, with_, answer), log_probability(model, without, answer)
    found = sup.surprises(model, with_, without, answer)
    assert [-x for x in found[0]] == pytest.approx(after, abs=1e-4)
    assert [-x for x in found[1]] == pytest.approx(before, abs=1e-4)
    gains = [a - b for a, b in zip(after, before)]
    text = [gain for gain, token in zip(gains, answer) if not tokenizer.is_special(token)]
    assert sup.contrast(model, tokenizer, with_, without, answer) == pytest.approx(np.mean(text), abs=1e-4)
    share = 1 - sum(after[len(cite) :]) / sum(before[len(cite) :])
    assert sup.explained(model, tokenizer, with_, without, answer) == pytest.approx(max(share, -1), abs=1e-4)


def test_contrast_of_equal_prompts_or_no_text_is_0(model, tokenizer):
    prompt = tokenizer.encode("Where?", bos=True)
    for measure in (sup.contrast, sup.explained):
        assert measure(model, tokenizer, prompt, prompt, tokenizer.encode("Here.")) == pytest.approx(0.0, abs=1e-6)
        assert measure(model, tokenizer, prompt, prompt, []) == 0.0
        assert measure(model, tokenizer, prompt, prompt, [tokenizer.eot]) == 0.0


def test_contrast_longer_than_the_context_is_an_error(model, tokenizer):
    prompt = tokenizer.encode("a" * 50, bos=True)
    long = tokenizer.encode("Torwick " * 300)
    with pytest.raises(UsageError, match="context only 256"):
        sup.contrast(model, tokenizer, prompt, prompt, long)


# ---- all together

CALIBRATION = {
    frozenset({"lexical"}): Weights(-5.0, lexical=10.0),
    frozenset({"lexical", "contrast"}): Weights(-5.0, lexical=8.0, contrast=1.0),
    frozenset({"lexical", "embedding"}): Weights(-5.0, lexical=8.0, embedding=1.0),
}


def answer(*sentences, abstained=False):
    return Answer(tuple(Sentence(text, cited) for text, cited in sentences), abstained, ())


def test_each_sentence_is_measured_by_what_it_cites():
    said = answer(
        ("Mara Velt was born in Torwick.", (1,)), ("Mara Velt was born in Torwick.", (2,)),
        ("Mara Velt was born in Torwick.", ()), ("Mara Velt was born in Torwick.", (7,)),
    )  # fmt: skip
    found = sup.support(said, [MARA, BRAM], calibration=CALIBRATION)
    assert [round(each.lexical, 2) for each in found][::2] == [1.0, 1.0]
    assert found[1].lexical < 0.5
    assert found[3] == found[2]  # a number that names no document is no citation
    for each in found:
        assert each.score == pytest.approx(1 / (1 + math.exp(5 - 10 * each.lexical)))
        assert (each.embedding, each.contrast) == (None, None)


def test_the_hallucination_score_is_that_of_the_weakest_sentence():
    good, bad = ("Mara Velt was born in Torwick.", (1,)), ("Bram Cobb owns a green boat.", (1,))
    options = {"calibration": CALIBRATION}
    scores = [each.score for each in sup.support(answer(good, bad), [MARA], **options)]
    assert sup.hallucination_score(answer(good, bad), [MARA], **options) == pytest.approx(1 - min(scores))
    assert sup.hallucination_score(answer(good), [MARA], **options) < 0.01
    assert sup.hallucination_score(answer(bad), [], **options) > 0.99


def test_abstaining_and_silence_say_nothing_false():
    assert sup.hallucination_score(answer(("I do not know.", ()), abstained=True), [MARA]) == 0.0
    assert sup.hallucination_score(answer(("I do not know.", ())), [MARA]) == 0.0
    assert sup.hallucination_score(answer(), [MARA]) == 0.0


def test_contrast_of_a_sentence_follows_what_was_said_before(model, tokenizer):
    messages = [retrieval_message([MARA, BRAM]).message, {"role": "user", "content": BORN}]
    said = answer(("In Torwick.", (1, 2)), ("So it is.", ()))
    found = sup.support(said, [MARA, BRAM], model=model, tokenizer=tokenizer, messages=messages,
                        calibration=CALIBRATION)  # fmt: skip
    special, encode = tokenizer.special, tokenizer.encode
    before = [special("cite_start"), *encode("1"), special("cite_end"),
              special("cite_start"), *encode("2"), special("cite_end")]  # fmt: skip
    prompts = [tokenizer.render_prompt({"messages": m}).ids for m in (messages, messages[1:])]
    first, second = encode("In Torwick."), encode("So it is.")
    expected = [
        sup.explained(model, tokenizer, *([*prompt, *before] for prompt in prompts), first),
        sup.explained(model, tokenizer, *([*prompt, *before, *first] for prompt in prompts), second),
    ]
    assert [each.contrast for each in found] == pytest.approx(expected, abs=1e-5)


def test_embeddings_join_the_score():
    (found,) = sup.support(answer(("Torwick.", (1,))), [MARA], embedder=Letters(), calibration=CALIBRATION)
    assert found.embedding is not None
    parts = {"lexical": found.lexical, "embedding": found.embedding}
    assert found.score == pytest.approx(probability(parts, CALIBRATION))


def test_a_judge_has_the_last_word():
    class Strict:
        name = "strict"

        def judge(self, question, claim, documents):
            return 0.25 if (question, [d.id for d in documents]) == (BORN, ["2"]) else 1.0

    (found,) = sup.support(answer(("In Torwick.", (2,))), [MARA, BRAM], question=BORN, judge=Strict())
    assert found.score == 0.25


def test_half_of_what_contrast_needs_is_an_error(model):
    with pytest.raises(UsageError, match="all three"):
        sup.support(answer(("Torwick.", ())), [MARA], model=model)


def test_citations_are_scored_one_by_one():
    said = answer(("Mara Velt was born in Torwick.", (1, 2)), ("Yes.", ()))
    first, second = sup.citation_scores(said, [MARA, BRAM], BORN)
    assert first[1] > 0.9 > 0.5 > first[2]
    assert second == {}


# ---- calibration


def test_fit_finds_the_maximum_of_the_likelihood():
    random = np.random.default_rng(0)
    rows = [{"lexical": float(a), "contrast": float(b)} for a, b in random.normal(size=(400, 2))]
    p = [1 / (1 + math.exp(-(0.5 + 2 * row["lexical"] - row["contrast"]))) for row in rows]
    labels = [bool(u < q) for u, q in zip(random.uniform(size=400), p)]
    found = fit(rows, labels, l2=0.0)
    assert (found.bias, found.lexical, found.contrast) == pytest.approx((0.5, 2.0, -1.0), abs=0.5)
    assert found.embedding == 0.0
    gaps = [
        y - 1 / (1 + math.exp(-(found.bias + found.lexical * r["lexical"] + found.contrast * r["contrast"])))
        for r, y in zip(rows, labels)
    ]
    for name in ("lexical", "contrast"):  # the gradient
        assert sum(gap * row[name] for gap, row in zip(gaps, rows)) == pytest.approx(0.0, abs=1e-4)
    assert sum(gaps) == pytest.approx(0.0, abs=1e-4)


def test_separable_examples_give_finite_weights():
    found = fit([{"lexical": float(x)} for x in (0, 0.1, 0.9, 1)], [False, False, True, True])
    assert 0 < found.lexical < 1e3


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([], [], "same parts"),
        ([{"lexical": 1.0}, {"contrast": 1.0}], [True, False], "same parts"),
        ([{"lexical": 1.0}], [True, False], "same parts"),
        ([{"lexical": 1.0}, {"lexical": 0.0}], [True, True], "supported and unsupported"),
    ],
)
def test_what_cannot_be_fitted(rows, labels, message):
    with pytest.raises(UsageError, match=message):
        fit(rows, labels)


def test_parts_without_weights_are_an_error():
    with pytest.raises(UsageError, match=r"no weights for contrast, lexical, only for: lexical$"):
        probability({"lexical": 1.0, "contrast": 0.0}, {frozenset({"lexical"}): Weights(0.0)})


def test_reliability_of_hand_made_scores():
    found = reliability([0.1, 0.2, 0.8, 0.8], [False, True, False, True])
    assert found.n == 4
    assert found.auc == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert found.ece == pytest.approx((0.1 + 0.8 + 0.8 + 0.2) / 4)
    assert found.brier == pytest.approx((0.01 + 0.64 + 0.64 + 0.04) / 4)
    assert found.accuracy == 0.5
    with pytest.raises(UsageError, match="supported and unsupported"):
        reliability([0.5], [True])


def test_examples_are_reproducible_and_labelled_as_they_say():
    examples = list(world_examples(5, 40))
    assert examples == list(world_examples(5, 40))
    assert [e.supported for e in examples] == [True, False] * 20
    for e in examples:
        stated = {s for d in e.documents for s in sup.sentences(d.content)}
        assert e.supported or e.sentence not in stated
        assert len(e.documents) == 3


def test_shipped_calibration_holds_on_fresh_worlds():
    examples = list(world_examples(77, 240))
    scores = [
        probability({"lexical": sup.lexical_support(e.sentence, e.documents, e.question)}) for e in examples
    ]
    quality = reliability(scores, [e.supported for e in examples])
    assert quality.auc > 0.95
    assert quality.ece < 0.1
    assert quality.accuracy > 0.87
    assert all(weights.lexical > 0 for weights in cal.DEFAULT.values())


def test_calibrate_fits_every_choice_of_parts():
    examples = list(world_examples(3, 60))
    found = sup.calibrate(examples, embedder=Letters(), contrast=lambda e: 2.0 if e.supported else -0.5)
    assert {tuple(sorted(key)) for key in found} == {
        ("lexical",), ("embedding", "lexical"), ("contrast", "lexical"), ("contrast", "embedding", "lexical")
    }  # fmt: skip
    assert found[frozenset({"lexical", "contrast"})].contrast > 1
    plain = [{"lexical": sup.lexical_support(e.sentence, e.documents, e.question)} for e in examples]
    assert found[frozenset({"lexical"})] == fit(plain, [e.supported for e in examples])
