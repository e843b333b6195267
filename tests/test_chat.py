"""A conversation in a terminal with a model behind Ollama: processes, a pseudo-terminal and the stand-in server."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from chat_in_a_terminal import Chat
from ollama_stand_in import StandIn, write_program

MODEL = "gpt-oss:20b"


@pytest.fixture
def chat(forkserver):
    started = []

    def start(*arguments, **options):
        started.append(Chat(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def server(monkeypatch):
    """A server that ran before; it answers with the last line of what it is asked and a citation."""
    with StandIn() as running:
        running.models[MODEL] = 13_780_173_839
        running.say = lambda body: f"You asked: {body['messages'][-1]['content'].splitlines()[-1]} [1]"
        monkeypatch.setenv("OLLAMA_HOST", running.url)
        monkeypatch.delenv("HELPERS_LLM", raising=False)
        yield running


def chats(server):
    return [body for path, body in server.requests if path == "/api/chat"]


def test_a_conversation_question_follow_up_empty_line_long_line_salir(chat, server):
    talk = chat("--llm", f"ollama:{MODEL}")
    talk.until("\n> ")
    (warmed,) = server.asked("/api/generate")  # the first question doesn't wait for the model
    assert warmed["options"] == {"num_ctx": 8192}
    talk.say("Who makes the Lumbrera 9?")
    shown = talk.until("s)\r\n")
    assert "You asked: Who makes the Lumbrera 9? [1]" in shown and "Sources: [1] " in shown
    talk.say("")
    talk.until("> ")
    talk.say("And how heavy is it?")
    assert "Asked: You asked: Last question: And how heavy is it? [1]" in talk.until("s)\r\n")
    rewriting, answering = chats(server)[1:]
    assert "Who makes the Lumbrera 9?" in rewriting["messages"][-1]["content"]  # the conversation so far
    assert answering["messages"][-1]["content"].startswith("<passages>")
    talk.say("why " * 900 + "?")  # a terminal takes 4,095 characters a line
    assert "why why ? [1]\r\nSources" in talk.until("s)\r\n")
    assert talk.leave() == 0
    assert all(body["options"]["num_ctx"] == 8192 and body["think"] == "low" for body in chats(server))


def test_ctrl_c_ends_the_answer_and_its_stream_and_not_the_chat(chat, server):
    talk = chat("--llm", f"ollama:{MODEL}")
    talk.until("\n> ")
    server.chat = "endless"
    talk.say("¿Quién fabrica la Lumbrera 9?")
    talk.until("more more")
    os.kill(talk.pid, signal.SIGINT)
    assert "Detenido." in talk.until("> ")
    assert server.gone.wait(5)  # the server saw its client leave
    server.chat = "answer"
    talk.say("Who makes it?")
    assert "You asked: Who makes it? [1]" in talk.until("s)\r\n")
    assert talk.leave() == 0


def test_an_answer_that_fails_is_said_and_the_chat_goes_on(chat, server):
    talk = chat("--llm", f"ollama:{MODEL}")
    talk.until("\n> ")
    for mode, said in (("die", "broke off"), ("cut", "of about"), ("length", "ran out of tokens while thinking")):
        server.chat = mode
        talk.say("Who makes the Lumbrera 9?")
        assert said in talk.until("\n> ").replace("\r\n", " ")
    server.chat = "answer"
    talk.say("Who makes it?")
    assert "You asked: Who makes it? [1]" in talk.until("s)\r\n")
    assert talk.leave() == 0


def test_the_model_that_is_missing_is_fetched_where_the_person_says_yes(chat, server):
    del server.models[MODEL]
    talk = chat()
    talk.until("Fetch gpt-oss:20b with Ollama (14 GB; it needs 16 GB of memory)? [y/N] ")
    assert not server.asked("/api/pull")
    talk.say("sí")
    talk.until("\n> ")
    assert len(server.asked("/api/pull")) == 1 and MODEL in server.models
    talk.say("Who makes the Lumbrera 9?")
    assert "You asked: Who makes the Lumbrera 9? [1]" in talk.until("s)\r\n")
    assert chats(server)[-1]["options"]["num_predict"] > 1000  # it thinks first, and that counts
    assert talk.leave() == 0


def test_the_question_whether_to_fetch_is_no_part_of_the_answer(server, tmp_path, monkeypatch):
    """Standard output goes to a file, and HELPERS_LLM is there and empty; the terminal shows the question."""
    del server.models[MODEL]
    monkeypatch.setenv("HELPERS_LLM", "")
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "helpers", "ask", "--json", b"Qui\xe9n fabrica la Lumbrera 9?"]  # no UTF-8
    with (tmp_path / "answer.json").open("wb") as out:
        process = subprocess.Popen(command, stdin=end, stdout=out, stderr=end, start_new_session=True)
        shown = b""
        while b"[y/N] " not in shown:
            assert select.select([terminal], [], [], 60)[0], shown
            shown += os.read(terminal, 65536)
        os.write(terminal, b"n\n")
        assert process.wait(60) == 0
    os.close(terminal)
    os.close(end)
    given = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
    assert given["model"] == "quotes" and given["question"] == "Qui\ufffdn fabrica la Lumbrera 9?"


@pytest.mark.parametrize("reply", [b"\n", b"\x04"], ids=["empty", "Ctrl-D"])
def test_without_a_yes_nothing_is_fetched_and_quotes_answer(chat, server, reply):
    del server.models[MODEL]
    talk = chat()
    talk.until("[y/N] ")
    os.write(talk.terminal, reply)
    assert "Model: quotes" in talk.until("\n> ") and not server.asked("/api/pull")
    os.write(talk.terminal, b"Qui\xe9n?\n")  # no UTF-8
    talk.until("s)\r\n")
    assert talk.leave() == 0


def test_a_citation_of_a_passage_that_was_not_given_is_said(chat, server):
    server.say = lambda body: "Nobody [1][9]."
    talk = chat("--llm", f"ollama:{MODEL}")
    talk.until("\n> ")
    talk.say("Who makes it?")
    assert "Cited, and not among the passages: [9]" in talk.until("s)\r\n")
    assert talk.leave() == 0


def test_the_server_that_chat_started_is_gone_when_it_ends(chat, monkeypatch, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = write_program(tmp_path / "bin")
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)

    def running():
        return [one for one in psutil.process_iter(["cmdline"]) if str(program) in (one.info["cmdline"] or ())]

    talk = chat("--llm", "ollama:plain:1b", fresh=True)
    talk.until("\n> ")
    assert running()
    talk.say("Who makes the Lumbrera 9?")
    talk.until("s)\r\n")
    assert talk.leave() == 0
    assert not running()


def test_the_first_word_of_the_embedded_model_comes_within_a_second(chat):
    """In a chat that has answered once; the best of three. Where others keep the cores busy, the CPU's time counts."""
    talk = chat("--llm", "tiny")
    talk.until("\n> ", 300)
    talk.say("Who makes the Lumbrera 9?")
    waits = []
    for question in ("Who keeps the light?", "¿Cuánto mide el faro?", "What does a ticket to Isla Mansa cost?"):
        talk.until("s)\r\n\r\n> ", 300)
        waits.append(talk.first_word(question))
    on_the_clock, of_the_cpu = map(min, zip(*waits, strict=True))
    busy = os.getloadavg()[0] > psutil.cpu_count()
    assert (of_the_cpu if busy else on_the_clock) < 1.0, waits
    talk.until("s)\r\n\r\n> ")
    assert talk.leave() == 0
