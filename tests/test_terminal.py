"""The terminal: one answer, a conversation, documents, files, several lines."""

import json
from pathlib import Path

import pytest
from tiny_run import GREEDY, TOKENIZER, save_stage

from nanochat import terminal
from nanochat.chat import load
from nanochat.engine.sampling import Sampling
from nanochat.errors import NanochatError, UsageError
from nanochat.rag.multihop_chat import MultiHopChat
from nanochat.terminal import chat_cli


def test_one_shot_prints_the_answer_and_the_speed(chat, out, capsys):
    assert chat_cli(["-p", "Hi", "--out_dir", str(out), "--temperature=0", "--max-tokens", "8"]) == 0
    shown = capsys.readouterr()
    assert shown.out == chat.chat("Hi", **GREEDY) + "\n"
    assert "tok/s" in shown.err
    assert "kernel" not in shown.err  # nothing of the log stands between the words
    with pytest.raises(UsageError, match="the prompt is empty"):
        chat_cli(["-p", " ", "--out_dir", str(out)])
    with pytest.raises(UsageError, match="--documents 0: expected 1 or more"):
        chat_cli(["--documents", "0", "--out_dir", str(out)])


def test_a_base_model_continues_text_unless_told_otherwise(out, capsys):
    base = load("base", out_dir=out)
    common = ["-p", "Hi", "--out_dir", str(out), "--source", "base", "--temperature=0", "--max-tokens", "8"]
    chat_cli(common)
    assert capsys.readouterr().out == base.generate("Hi", **GREEDY) + "\n"
    chat_cli([*common, "--mode", "chat"])
    assert capsys.readouterr().out == base.chat("Hi", **GREEDY) + "\n"


def type_lines(monkeypatch, *lines) -> None:
    waiting = list(lines)

    def read(prompt=""):
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)


def test_a_conversation_at_the_prompt(out, monkeypatch, capsys):
    type_lines(
        monkeypatch, "Hi", "/temp 0", "/top_k", "/retry", KeyboardInterrupt, "/nonsense", "/temp x", "/help", "/new", ""
    )
    assert chat_cli(["--out_dir", str(out), "--max_tokens=4", "--seed=5"]) == 0  # a seed with which it says something
    shown = capsys.readouterr()
    assert shown.err.count("tok/s") == 2
    assert "temperature 0.0" in shown.out
    assert "/quit or Ctrl-D leaves" in shown.out
    assert "unknown command /nonsense" in shown.err
    assert "/temp x: expected a number" in shown.err
    assert "/retry" in shown.out


def test_the_session_keeps_the_conversation(chat, capsys):
    session = terminal.Session(chat, Sampling(max_tokens=4, temperature=0.0), system="Be brief.")
    session.answer("One?")
    session.answer("Two?")
    assert [m["role"] for m in session.messages] == ["system", "user", "assistant", "user", "assistant"]
    session.retry()
    assert len(session.messages) == 5
    session.command("/system Be long.")
    assert session.messages == [{"role": "system", "content": "Be long."}]
    session.retry()
    assert "no answer to try again" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is(chat, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        yield "par"
        yield "tial"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream_chat", interrupted)
    session = terminal.Session(chat, Sampling())
    assert session.answer("Hi") == 130
    assert session.messages[-1] == {"role": "assistant", "content": "partial"}
    assert "[stopped]" in capsys.readouterr().err


def test_the_terminal_answers_from_documents(chat, out, knowledge, capsys):
    common = ["--out_dir", str(out), "--max_tokens", "8", "--knowledge_base", str(knowledge), "--documents", "1"]
    assert chat_cli(["-p", "Who founded Torwick?", *common]) == 0
    shown = capsys.readouterr()
    expected = chat.with_knowledge(knowledge, top_k=1).chat("Who founded Torwick?", max_tokens=8)
    assert shown.out == "\n".join([expected.text, *expected.sources]) + "\n"
    assert "1 document, support" in shown.err
    assert chat_cli(["-p", "Who built Underwade?", *common]) == 0
    shown = capsys.readouterr()
    assert shown.out == "I do not know.\n"
    assert "no document found" in shown.err


def test_the_terminal_shows_sources(chat, monkeypatch, capsys, knowledge):
    grounded = chat.with_knowledge(knowledge)
    cited = [TOKENIZER.special("cite_start"), *b"1", TOKENIZER.special("cite_end"), *b"Mara did.", TOKENIZER.eot]
    monkeypatch.setattr("nanochat.engine.generate.sample", lambda logits, *_: ([cited.pop(0)], [0.0]))
    session = terminal.Session(grounded, Sampling(temperature=0.0))
    session.answer("Who founded Torwick?")
    shown = capsys.readouterr()
    assert shown.out == "Mara did. [1]\n[1] Torwick (towns.jsonl)\n"
    assert ", 1 document, support 1.00]" in shown.err
    assert session.messages[-1] == {"role": "assistant", "content": "Mara did. [1]"}


def test_a_conversation_about_documents(out, knowledge, monkeypatch, capsys):
    type_lines(monkeypatch, "Who founded Torwick?", "/retry", "And Orvane?", "/temp", "/new")
    assert chat_cli(["--out_dir", str(out), "--max_tokens=4", "--knowledge_base", str(knowledge)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count(", 1 document, support") == 3
    assert str(knowledge) in shown.err
    assert "temperature 0.0" in shown.out


def test_the_terminal_takes_the_stage_that_was_trained_on_documents(knowledge, tmp_path, capsys, caplog):
    ask = ["-p", "Torwick?", "--out_dir", str(tmp_path), "--max_tokens=2", "--knowledge_base", str(knowledge)]
    save_stage(tmp_path, "base")
    chat_cli([*ask, "--source", "base"])  # a base model chats when it has documents
    assert "stage base" in caplog.text
    save_stage(tmp_path, "rag")
    save_stage(tmp_path, "sft")
    caplog.clear()
    chat_cli(ask)
    assert "never trained" not in caplog.text
    chat_cli([*ask, "--source", "sft"])
    assert "stage sft" in caplog.text


def test_a_model_that_searches_on_its_own(knowledge, tmp_path, capsys, caplog, monkeypatch):
    ask = ["-p", "Torwick?", "--out_dir", str(tmp_path), "--max_tokens=2", "--knowledge_base", str(knowledge)]
    save_stage(tmp_path, "sft")
    save_stage(tmp_path, "refrag")
    chats = []
    tool = MultiHopChat.tool
    monkeypatch.setattr(MultiHopChat, "tool", lambda self, question: chats.append(self) or tool(self, question))
    assert chat_cli([*ask, "--max_hops", "2", "--documents", "1"]) == 0
    assert (chats[-1].max_hops, chats[-1].top_k) == (2, 1)
    assert "never trained" not in caplog.text
    assert "tokens, first after" in capsys.readouterr().err


def test_wrong_flags_with_documents(out, knowledge, tmp_path):
    common = ["-p", "Torwick?", "--out_dir", str(out)]
    with pytest.raises(UsageError, match="does not exist"):
        chat_cli([*common, "--knowledge_base", str(tmp_path / "nothing")])
    with pytest.raises(UsageError, match="a text is continued without documents"):
        chat_cli([*common, "--knowledge_base", str(knowledge), "--mode", "text"])
    with pytest.raises(UsageError, match="--documents 0"):
        chat_cli([*common, "--knowledge_base", str(knowledge), "--documents", "0"])
    with pytest.raises(UsageError, match="only with --knowledge_base"):
        chat_cli([*common, "--max_hops", "2"])
    with pytest.raises(UsageError, match="psychic"):
        chat_cli([*common, "--knowledge_base", str(knowledge), "--retriever_type", "psychic"])
    (tmp_path / "kb" / "manifest.json").parent.mkdir()
    (tmp_path / "kb" / "manifest.json").write_text("{")
    with pytest.raises(NanochatError, match="manifest"):
        chat_cli([*common, "--knowledge_base", str(tmp_path / "kb")])


# ---- commands of a conversation


@pytest.fixture
def session(chat) -> terminal.Session:
    return terminal.Session(chat, Sampling(max_tokens=4, temperature=0.0), system="Be brief.")


def test_a_conversation_is_saved_and_loaded(session, chat, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session.answer("Ünder the bridge?")
    session.command("/save chat.json")
    assert json.loads((tmp_path / "chat.json").read_text(encoding="utf-8")) == {"messages": session.messages}
    session.answer("And then?")
    session.command("/save chat.json")  # its own file
    other = terminal.Session(chat, session.sampling)
    other.command("/load chat.json")
    assert (other.messages, other.system) == (session.messages, "Be brief.")
    assert "loaded 5 messages from" in capsys.readouterr().out
    other.retry()
    assert other.messages == session.messages  # greedy
    other.command("/new")
    assert other.messages == [{"role": "system", "content": "Be brief."}]
    with pytest.raises(UsageError, match="there is such a file already"):
        other.command("/save chat.json")
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"messages": 3}', '{"messages": [{"role": "cook", "content": "x"}]}', "[" * 9999]
)
def test_files_that_hold_no_conversation(session, tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    before = list(session.messages)
    with pytest.raises(NanochatError, match=r"/load .*x\.json: "):
        session.command(f"/load {tmp_path / 'x.json'}")
    assert session.messages == before


def test_files_that_cannot_be_written_or_read(session, tmp_path):
    with pytest.raises(NanochatError, match=r"/save .*: No such file or directory$"):
        session.command(f"/save {tmp_path / 'no' / 'x.json'}")
    with pytest.raises(NanochatError, match=r"/load .*No such file"):
        session.command(f"/load {tmp_path / 'x.json'}")
    for command in ("/save", "/load"):
        with pytest.raises(UsageError, match=f"{command}: expected a file"):
            session.command(command)


def test_documents_come_and_go(out, knowledge, monkeypatch, capsys):
    ask = ("Who founded Torwick?", "/temp")
    type_lines(monkeypatch, "/kb", f"/kb {knowledge}", *ask, "/kb", "/kb nowhere", "/kb off", *ask)
    chat_cli(["--out_dir", str(out), "--max_tokens=4"])
    shown = capsys.readouterr()
    assert shown.err.count("1 document, support") == 1
    assert shown.err.count("tokens, first after") == 2
    assert "error: nowhere does not exist" in shown.err
    said = shown.out.splitlines()
    assert said[:2] == ["no knowledge base", f"answers rest on {knowledge}"]
    assert said.count(str(knowledge)) == 1
    shown_temperatures = [line.split(", ")[1] for line in said if line.startswith("max_tokens")]
    assert shown_temperatures == ["temperature 0.0", "temperature 0.8"]


def test_a_temperature_that_was_chosen_stays(out, knowledge, monkeypatch, capsys):
    type_lines(monkeypatch, "/temp 0.3", f"/kb {knowledge}", "/temp")
    chat_cli(["--out_dir", str(out)])
    assert "temperature 0.3" in capsys.readouterr().out


def test_a_text_has_no_documents(out, knowledge, monkeypatch, capsys):
    type_lines(monkeypatch, f"/kb {knowledge}")
    chat_cli(["--out_dir", str(out), "--source", "base"])
    assert "/kb: a text is continued without documents" in capsys.readouterr().err


def test_messages_of_several_lines(out, monkeypatch, capsys):
    asked: list[str] = []
    monkeypatch.setattr(terminal.Session, "answer", lambda self, text: asked.append(text))
    typed = ('"""', "/new", "  two", '"""', "a\\", "b", '"""one"""', '""" x', KeyboardInterrupt, "last", '"""', "never")
    type_lines(monkeypatch, *typed)
    chat_cli(["--out_dir", str(out)])
    assert asked == ["/new\n  two", "a\nb", "one", "last"]


def test_commands_are_explained():
    page = (Path(terminal.__file__).parents[1] / "docs" / "chat.md").read_text(encoding="utf-8")
    for command in terminal.COMMANDS:
        assert f"{command} " in terminal.HELP.replace("\n", " ")
        assert f"`{command}" in page
