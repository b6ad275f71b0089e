"""The command rag_eval: a random model goes through it, and what is wrong with a call is said."""

import json

import pytest
from readers import hotpot

from nanochat import checkpoint
from nanochat.data.world import World
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation import rag_commands
from nanochat.evaluation.rag_result import CONDITIONS
from nanochat.intervals import share
from nanochat.retrieval.document import Document

WORLD = World(7, 20, 60)


@pytest.fixture(scope="module")
def out_dir(reader, reader_tokenizer, tmp_path_factory):
    """A run with an SFT checkpoint and one of a RAG stage."""
    out = tmp_path_factory.mktemp("out")
    reader_tokenizer.save(out / "demo" / "tokenizer")
    for stage in ("sft", "rag"):
        meta = {"stage": stage, "model_config": reader.config.to_dict(), "metrics": {}}
        meta["tokenizer_hash"] = reader_tokenizer.hash
        checkpoint.save(out / "demo" / stage, 3, {"model": reader.state_dict()}, meta)
    return out


SMALL = ["--max_problems", "8", "--max_unanswerable", "4", "--max_tokens", "6", "--latency_questions", "1",
         "--top_k", "2", "--samples", "3"]  # fmt: skip


@pytest.mark.parametrize("contrast", [False, True])
def test_rag_eval_of_a_world(out_dir, capsys, caplog, contrast):
    arguments = ["--out_dir", str(out_dir), "--questions", "world:seed=7,known=20,new=60", "--retriever_type", "simple"]
    rag_commands.rag_eval([*arguments, *SMALL, *(["--contrast"] if contrast else [])])
    record = json.loads((out_dir / "demo" / "rag_eval_rag.json").read_text())
    assert (record["kind"], record["stage"], record["step"]) == ("rag_eval", "rag", 3)
    assert {"closed_book_new_em", "rag_em", "rag_gold_em", "rag_shuffled_em", "no_documents_em", "hallucination_rate",
            "abstain_unanswerable", "retrieval_recall", "rag_latency_ms"} <= set(record["metrics"])  # fmt: skip
    assert record["metrics"]["hallucination_rate"]["n"] == 12
    assert record["metrics"]["retrieval_recall"]["value"] > 0.8
    assert {sample["condition"] for sample in record["samples"]} == set(CONDITIONS)
    assert "right answer" in capsys.readouterr().out
    assert "never trained on retrieved documents" not in caplog.text


def test_a_checkpoint_never_trained_on_retrieval_is_evaluated_with_a_warning(out_dir, caplog, tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text("\n".join(json.dumps(hotpot(i)) for i in range(3)))
    rag_commands.rag_eval(["--out_dir", str(out_dir), "--source", "sft", "--questions", str(path), *SMALL])
    assert "was never trained on retrieved documents" in caplog.text
    record = json.loads((out_dir / "demo" / "rag_eval_sft.json").read_text())
    assert {"closed_book_em", "rag_em"} <= set(record["metrics"])
    assert record["metrics"]["rag_em"]["n"] == 3


def test_rag_eval_of_own_questions_and_knowledge_base(out_dir, tmp_path):
    from nanochat.retrieval import KnowledgeBase

    with KnowledgeBase.create(tmp_path / "kb", kind="simple") as base:
        base.add([Document("d1", "Mara Velt was born in Torwick.", "Mara"), Document("d2", "Bram likes soup.", "Bram")])
    rows = [{"question": "Where was Mara Velt born?", "answer": "Torwick", "gold": ["d1"]},
            {"question": "Who likes soup?", "answer": "Bram", "gold": ["d2"]}, {"question": "Why?"}]  # fmt: skip
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    result = rag_commands.evaluate_rag_settings(
        rag_commands.RagEvalSettings(
            out_dir=str(out_dir), questions=str(path), knowledge_base=str(tmp_path / "kb"), max_tokens=4,
            latency_questions=1,
        )
    )  # fmt: skip
    assert result.metrics(new=False)["retrieval_recall"] == share(2, 2)
    assert [j.documents[0] for j in result.columns["rag_gold"].judged] == ["Mara", "Bram"]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--top_k=0", "--batch_size=0", "--order=best", "--questions=nowhere.jsonl", "--knowledge_base=nowhere"],
         ["--top_k 0", "--batch_size 0", "--order best", "--questions nowhere.jsonl", "--knowledge_base nowhere"]),
        (["--conditions", "rag", "gold"], ["--conditions gold", "rag_gold"]),
        (["--retriever_type=bm52"], ["--retriever_type bm52"]),
        (["--questions=world:sed=7"], ["unknown option 'sed'"]),
        (["--questions=world:seed=7,known=20,new=60", "--max_problems=5000"], ["give only", "new=902"]),
        (["--question=x"], ["did you mean --questions"]),
        (["--temperature=-1"], ["--temperature -1"]),
    ],
)  # fmt: skip
def test_wrong_calls(out_dir, arguments, messages):
    with pytest.raises(UsageError) as error:
        rag_commands.rag_eval(["--out_dir", str(out_dir), *arguments])
    for message in messages:
        assert message in str(error.value)


def test_a_knowledge_base_that_is_empty_or_none_is_refused(out_dir, tmp_path):
    from nanochat.retrieval import KnowledgeBase

    KnowledgeBase.create(tmp_path / "kb", kind="simple").close()
    (tmp_path / "none").mkdir()
    for directory, message in ((tmp_path / "kb", "holds no documents"), (tmp_path / "none", "none")):
        with pytest.raises(NanochatError, match=message):
            rag_commands.rag_eval(
                ["--out_dir", str(out_dir), "--questions=world:seed=7,known=20,new=60", *SMALL,
                 "--knowledge_base", str(directory)]
            )  # fmt: skip
