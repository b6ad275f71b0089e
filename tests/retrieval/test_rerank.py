"""Rerankers: feedback against a plain cosine, cross-encoders against transformers, and what a bad one is told."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Document, Hit
from nanochat.retrieval.onnx_file import Graph
from nanochat.retrieval.rerank import CrossEncoderReranker, FeedbackReranker, make_reranker, rerank

WORDS = ["moon", "air", "dust", "rock", "water", "ice", "sun", "light"]
texts = st.lists(st.sampled_from(WORDS), max_size=10).map(" ".join)


def hits_of(contents, scores=None):
    scores = scores or [float(len(contents) - i) for i in range(len(contents))]
    documents = [Document(f"d{i}", text) for i, text in enumerate(contents)]
    return [Hit(d.id, score, rank, d) for rank, (d, score) in enumerate(zip(documents, scores), 1)]


def feedback_by_hand(query, contents, n_feedback, share):
    """The same in dictionaries: TF-IDF with the candidates' own document frequencies, Rocchio, cosine."""
    bags = [Counter(text.split()) for text in contents]
    idf = {w: math.log((len(bags) + 1) / sum(w in bag for bag in bags)) for bag in bags for w in bag}

    def unit(vector):
        norm = math.sqrt(sum(x * x for x in vector.values()))
        return {w: x / norm for w, x in vector.items()} if norm else {}

    vectors = [unit({w: (1 + math.log(n)) * idf[w] for w, n in bag.items()}) for bag in bags]
    centre: Counter = Counter()
    for vector in vectors[:n_feedback]:
        centre.update(vector)
    wanted: Counter = Counter()
    for word in query.split():
        if word in idf:
            wanted[word] += idf[word]
    target = Counter({w: (1 - share) * x for w, x in unit(wanted).items()})
    target.update({w: share * x for w, x in unit(centre).items()})
    return [sum(x * target[w] for w, x in vector.items()) for vector in vectors]


@given(texts, st.lists(texts, max_size=8), st.integers(1, 4), st.floats(0, 1))
def test_feedback_is_rocchio(query, contents, n_feedback, share):
    reranker = FeedbackReranker("none", n_feedback=n_feedback, share=share)
    scores = reranker.scores(query, [hit.document for hit in hits_of(contents)])
    assert scores == pytest.approx(feedback_by_hand(query, contents, n_feedback, share), abs=1e-9)
    assert all(-1e-9 <= score <= 1 + 1e-9 for score in scores)


def test_feedback_on_nothing():
    feedback = FeedbackReranker()
    assert feedback.scores("moon", []) == []
    assert feedback.scores("moon", [Document("a", ""), Document("b", "…")]) == [0, 0]
    assert feedback.scores("", [Document("a", "moon"), Document("b", "sun")])[0] > 0
    assert len(feedback.scores("the", [Document("a", "moon " * 100_000), Document("b", "\ud800")])) == 2


@given(st.lists(st.tuples(texts, st.floats(-5, 5, width=32)), max_size=8), texts, st.integers(0, 10))
def test_reranked_hits_are_the_same_documents(pairs, query, k):
    hits = hits_of([text for text, _ in pairs], sorted((score for _, score in pairs), reverse=True))
    found = rerank(FeedbackReranker(), query, hits, k)
    assert len(found) == min(k, len(hits))
    assert [hit.rank for hit in found] == list(range(1, len(found) + 1))
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    assert all(0 <= hit.score <= 1 for hit in found)
    documents = {hit.id: hit.document for hit in hits}
    assert all(documents[hit.id] is hit.document for hit in found)
    assert len({hit.id for hit in found}) == len(found)


class Fixed:
    name = "fixed"

    def __init__(self, scores, weight=1.0, depth=50):
        self.given, self.weight, self.depth = scores, weight, depth

    def scores(self, query, documents):
        return self.given[: len(documents)]


def test_weight_mixes_with_the_search():
    hits = hits_of(["a", "b", "c"], [1.0, 0.9, 0.0])
    assert [hit.id for hit in rerank(Fixed([0, 1, 2]), "q", hits, 3)] == ["d2", "d1", "d0"]
    mixed = rerank(Fixed([0, 1, 2], weight=0.5), "q", hits, 3)
    assert [(hit.id, hit.score) for hit in mixed] == [("d1", pytest.approx(0.7)), ("d0", 0.5), ("d2", 0.5)]
    assert [hit.id for hit in rerank(Fixed([0, 1, 2], weight=0.0), "q", hits, 3)] == ["d0", "d1", "d2"]
    assert [hit.id for hit in rerank(Fixed([0, 1, 2], depth=2), "q", hits, 1)] == ["d1"]
    assert [hit.id for hit in rerank(Fixed([0, 1, 2], depth=2), "q", hits, 1, candidates=3)] == ["d2"]
    assert [hit.id for hit in rerank(Fixed([1, 1, 1]), "q", hits, 3)] == ["d0", "d1", "d2"]


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")], [1.0, float("inf")], [[1.0, 2.0], [3.0, 4.0]]])
def test_a_reranker_that_gives_no_scores(scores):
    with pytest.raises(NanochatError, match="fixed must give one finite score"):
        rerank(Fixed(scores), "q", hits_of(["a", "b"]), 2)


@pytest.mark.parametrize("settings", [{"n_feedback": 0}, {"share": 1.5}, {"weight": -1}, {"depth": 0}])
def test_bad_settings(settings):
    with pytest.raises(UsageError, match="feedback needs"):
        FeedbackReranker(**settings)


def test_rerankers_by_name(tmp_path):
    assert make_reranker(None) is make_reranker("none") is None
    fixed = Fixed([])
    assert make_reranker(fixed) is fixed
    assert make_reranker("feedback").name == "feedback"
    for bad in ("feedback:x", "cross-encoder", "magic"):
        with pytest.raises(UsageError, match="choose from none, feedback, cross-encoder:DIRECTORY"):
            make_reranker(bad)
    missing = tmp_path / "nowhere"
    with pytest.raises(UsageError, match=f"there is no directory {missing}"):
        make_reranker(f"cross-encoder:{missing}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A cross-encoder of random weights, in transformers' format."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("cross-encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, num_labels=1, initializer_range=1.0,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).eval().save_pretrained(folder)
    return folder


def reference(folder, query, contents):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return [float(model(**tokenizer(query, t, return_tensors="pt")).logits[0, 0]) for t in contents]


CONTENTS = ["moon air", "dust", "ice water sun light moon", "", "rock rock rock"]


@pytest.mark.filterwarnings("ignore")
def test_cross_encoder_of_sentence_transformers(tiny):
    pytest.importorskip("sentence_transformers")
    judge = CrossEncoderReranker(tiny, batch_size=2, max_length=40)
    scores = np.array(judge.scores("moon light", [Document(str(i), t) for i, t in enumerate(CONTENTS)]))
    expected = np.array(reference(tiny, "moon light", CONTENTS))
    assert np.argsort(scores).tolist() == np.argsort(expected).tolist()
    hits = rerank(judge, "moon light", hits_of(CONTENTS), 3)
    assert [hit.id for hit in hits] == [f"d{i}" for i in np.argsort(-expected)[:3]]


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_cross_encoder_in_onnx(tmp_path, classes):
    """The model sums tokens, those of the document, and those that are no padding, and multiplies by a matrix."""
    pytest.importorskip("onnxruntime")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    matrix = np.arange(1, 3 * classes + 1, dtype=np.float32).reshape(3, classes)
    graph = Graph()
    mask = graph.input("attention_mask", "int64", ["batch", "length"])
    sums = []
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        value = name if name == mask else graph.input(name, "int64", ["batch", "length"])
        kept = graph.node("Cast", graph.node("Mul", value, mask), to=1)
        sums.append(graph.node("ReduceSum", kept, graph.constant([1], "int64"), keepdims=1))
    graph.node("MatMul", graph.node("Concat", *sums, axis=1), graph.constant(matrix), name="logits")
    graph.output("logits", "float32", ["batch", classes])
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(graph.serialize())
    judge = CrossEncoderReranker(tmp_path, batch_size=2)
    documents = [Document(str(i), text) for i, text in enumerate(CONTENTS)]
    if classes == 3:
        with pytest.raises(UsageError, match="has 3 classes"):
            judge.scores("moon light", documents)
        return
    expected = []
    for text in CONTENTS:
        encoded = tokenizer.encode("moon light", text)
        logits = np.array([sum(encoded.ids), sum(encoded.type_ids), len(encoded.ids)]) @ matrix
        expected.append(logits[-1] - (logits[0] if classes == 2 else 0))
    assert judge.scores("moon light", documents) == pytest.approx(expected)


def test_models_that_are_not_there(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    pytest.importorskip("onnxruntime")
    with pytest.raises(NanochatError, match=r"no tokenizer\.json"):
        CrossEncoderReranker(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(NanochatError, match="cannot load the reranker"):
        CrossEncoderReranker(tmp_path)
    (tmp_path / "model.onnx").rename(tmp_path / "a.onnx")
    (tmp_path / "b.onnx").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"several \.onnx files"):
        CrossEncoderReranker(tmp_path)
