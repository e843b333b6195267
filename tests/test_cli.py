"""The terminal, driven as a person drives it: as a process, and through a pseudo-terminal."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from chat_in_a_terminal import Chat

from helpers import doctor, ollama, settings
from helpers.__main__ import Interrupt, main
from helpers.storage import IndexRefused

TEXTS = {
    "goat.txt": "The goat of Corvejón is called Almirante. The keeper Anselmo Grieve feeds it at dawn.",
    "faro.txt": "El faro de Cabo Lirón mide 21 metros. Lo pintaron de blanco en 1902.",
}


@pytest.fixture(autouse=True)
def without_a_model(monkeypatch):
    """Most of what a terminal does has nothing to do with the model that answers."""
    monkeypatch.setenv("HELPERS_LLM", "quotes")


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "INDEXES", tmp_path / "index")
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "helpers", *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


def test_ask_answers_with_sources(docs, capsys):
    assert main(["ask", "Who feeds the goat of Corvejón?", "--docs", str(docs)]) == 0
    out, err = capsys.readouterr()
    assert "Anselmo Grieve feeds it at dawn" in out and "Sources: [1] goat.txt, page 1" in out
    assert "2 new" in err
    assert main(["ask", "¿Cuánto mide el faro de Cabo Lirón?", "--docs", str(docs)]) == 0
    out, err = capsys.readouterr()
    assert "21 metros" in out and "Fuentes: [1] faro.txt, página 1" in out
    assert err == "Model: quotes (HELPERS_LLM says so)\n"


def test_ask_prints_json(docs, capsys):
    assert main(["ask", "Who feeds the goat?", "--docs", str(docs), "--json", "--top-k", "1", "--mode", "bm25"]) == 0
    given = json.loads(capsys.readouterr().out)
    assert given["question"] == "Who feeds the goat?" and not given["refused"]
    assert given["citations"][0]["file"] == "goat.txt" and len(given["hits"]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ask", "x", "--docs", "no-such-folder"], "There is no folder no-such-folder"),
        (["ask", "  "], "The question is empty"),
        (["ask", "x", "--top-k", "0"], "top_k is 0"),
        (["evaluate", "no-such-file.jsonl"], "There is no question file no-such-file.jsonl"),
        (["chat", "--docs", "no-such-folder"], "There is no folder"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(docs, capsys, arguments, said):
    if arguments == ["ask", "x", "--top-k", "0"]:
        arguments += ["--docs", str(docs)]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert said in err and "Traceback" not in err and out == ""


def test_index_shows_every_file(docs, capsys):
    (docs / "broken.pdf").write_bytes(b"%PDF-1.7 broken")
    for _ in range(2):  # the second time nothing is read, and the broken file is still named
        assert main(["index", "--docs", str(docs)]) == 0
        out = capsys.readouterr().out
        assert "goat.txt: 1 chunks" in out and "! broken.pdf: it is damaged" in out


def test_evaluate_prints_recall_and_quotes(docs, capsys, tmp_path):
    questions = tmp_path / "mine.jsonl"
    row = {"id": "1", "language": "en", "question": "Who feeds the goat?", "answers": ["Anselmo Grieve"]}
    row |= {"file": "goat.txt", "page": 1, "kind": "fact"}
    none = {"id": "2", "language": "en", "question": "What is tungsten?", "answers": [], "file": None, "page": None}
    questions.write_text(json.dumps(row) + "\n" + json.dumps(none | {"kind": "unanswerable"}), encoding="utf-8")
    assert main(["evaluate", str(questions), "--docs", str(docs)]) == 0
    out = capsys.readouterr().out
    assert "hybrid" in out and "bm25" in out and "dense" in out
    assert "1.000 [0.207, 1.000]" in out  # one question of one: the interval says how little that is
    assert "refused, rightly" in out
    questions.write_text(json.dumps(row | {"answers": ["Bruno"]}), encoding="utf-8")
    assert main(["evaluate", str(questions), "--docs", str(docs)]) == 2
    assert "no accepted answer stands on page 1" in capsys.readouterr().err


def test_a_closed_standard_input_is_an_empty_one(monkeypatch, docs):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "--docs", str(docs)]) == 0


def test_an_interrupt_that_was_lost_can_be_repeated(monkeypatch):
    interrupt, now = Interrupt(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    interrupt.armed = True
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT, None)
    interrupt(signal.SIGINT, None)  # at once: the first is being dealt with
    now[0] += 1.1
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT, None)


def test_chat_without_a_terminal_prompts_for_nothing():
    done = run("chat", input="Who feeds the goat of Corvejón?\n\n   \nsalir\nnever asked\n")
    assert done.returncode == 0
    assert "> " not in done.stdout and "Traceback" not in done.stderr
    assert done.stdout.count("Sources") + done.stdout.count("documents don't say") == 1


@pytest.mark.usefixtures("forkserver")
@pytest.mark.parametrize(
    ("leave", "fresh"), [("salir\n", False), ("EXIT\n", False), ("\x04", True)], ids=["salir", "EXIT", "Ctrl-D"]
)
def test_chat_in_a_terminal(leave, fresh):
    talk = Chat(fresh=fresh)
    try:
        talk.until("\n> ")
        talk.say("¿Quién fabrica la Lumbrera 9?")
        assert "Fuentes" in talk.until("s)\r\n")
        talk.say("")
        talk.until("> ")
        talk.press_ctrl_c()  # at the prompt it ends nothing
        talk.say("What is the boiling point of tungsten?")
        assert "documents don't say" in talk.until("s)\r\n")
        os.write(talk.terminal, leave.encode())
        assert talk.ended() == 0
    finally:
        talk.close()


def type_in(monkeypatch, typed):
    """Make bytes the standard input, which isn't a terminal."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))


@pytest.mark.parametrize("during", ["('salir')", "Stopped."])
def test_a_second_ctrl_c_while_the_first_is_dealt_with_ends_no_chat(during, docs, monkeypatch, capsys):
    from helpers import generation

    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        return ""

    def show(*text, **options):
        print(*text, **options)
        if during in str(text):
            interrupt()

    typed = iter([interrupt, lambda: "Who feeds the goat?\n", lambda: "salir\n"])
    type_in(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "readline", lambda: next(typed)(), raising=False)
    monkeypatch.setattr(generation, "answer", interrupt)
    monkeypatch.setattr("helpers.__main__.print", show, raising=False)
    before = signal.getsignal(signal.SIGINT)
    assert main(["chat", "--docs", str(docs)]) == 0
    assert "('salir')" in (out := capsys.readouterr().out) and "Stopped." in out
    assert next(typed, None) is None and signal.getsignal(signal.SIGINT) is before


def chat_with_a_failure(monkeypatch, docs, error):
    """Ask two questions in a chat that isn't in a terminal; the first ends with `error`."""
    from helpers import generation

    type_in(monkeypatch, "What fails?\nWho feeds the goat of Corvejón?\nsalir\n".encode())
    real = generation.answer

    def fails(question, *rest, **options):
        if "fails" in question:
            raise error
        return real(question, *rest, **options)

    monkeypatch.setattr(generation, "answer", fails)
    assert main(["chat", "--docs", str(docs)]) == 0


def test_ctrl_c_stops_an_answer_and_not_the_chat(docs, monkeypatch, capsys):
    chat_with_a_failure(monkeypatch, docs, KeyboardInterrupt)
    out = capsys.readouterr().out
    assert "Stopped." in out and "Anselmo Grieve" in out


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("There is no folder."), IndexRefused("It is refused."), RuntimeError("CUDA out of memory.")],
)
def test_a_question_that_fails_ends_no_chat(docs, monkeypatch, capsys, error):
    chat_with_a_failure(monkeypatch, docs, error)
    out, err = capsys.readouterr()
    assert f"helpers: {error}" in err and "Anselmo Grieve" in out


def test_a_byte_that_is_no_utf8_ends_no_chat(docs, monkeypatch, capsys):
    type_in(monkeypatch, b"Qui\xe9n?\nWho feeds the goat of Corvej\xc3\xb3n?\nsalir\n")
    assert main(["chat", "--docs", str(docs)]) == 0
    assert "Anselmo Grieve" in capsys.readouterr().out


def test_the_places_below_an_answer_are_printable(docs, capsys):
    (docs / "goat.txt").rename(docs / "goat\x1b[2J.txt")
    assert main(["ask", "Who feeds the goat of Corvejón?", "--docs", str(docs)]) == 0
    assert r"goat\x1b[2J.txt, page 1" in capsys.readouterr().out


@pytest.fixture
def without_ollama(monkeypatch):
    monkeypatch.delenv("HELPERS_LLM")
    monkeypatch.setattr(ollama, "find_binary", lambda: None)
    monkeypatch.setattr(ollama, "PROBE_SECONDS", 0.2)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # nothing listens there


@pytest.mark.usefixtures("without_ollama")
def test_without_ollama_quotes_answer_and_the_doctor_says_so(docs, monkeypatch, capsys):
    type_in(monkeypatch, b"Who feeds the goat?\nsalir\n")
    for arguments in (["ask", "Who feeds the goat?"], ["chat"]):
        assert main([*arguments, "--docs", str(docs)]) == 0
        out, err = capsys.readouterr()
        assert "Model: quotes (Ollama is not installed" in err and "feeds it at dawn" in out
    assert main(["doctor"]) == 0
    assert "; answer with quotes\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (ollama.Server(None, ("gpt-oss:20b",)), "answer with ollama:gpt-oss:20b"),
        (ollama.Server("/bin/ollama", ("plain:1b",)), "answer with quotes"),
        (ollama.Server("/bin/ollama", None), "answer with ollama:gpt-oss:20b if Ollama, once `chat` has started it"),
        (ollama.Server("/bin/ollama", None, "What answers is not Ollama."), "answer with quotes"),
    ],
)
def test_the_doctor_says_what_chat_would_take(monkeypatch, found, said):
    monkeypatch.setenv("HELPERS_LLM", "tiny")
    assert doctor._uses(found).found.endswith("answer with tiny (HELPERS_LLM says so)")
    monkeypatch.delenv("HELPERS_LLM")
    assert said in doctor._uses(found).found


def test_doctor_names_what_is_there_and_what_mends_the_rest(capsys, monkeypatch):
    monkeypatch.setattr(ollama, "look", lambda: ollama.Server(None, None))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for subject in ("Python", "Memory", "Disk", "GPU", "Packages", "Encoder", "Ollama", "Therefore"):
        assert f"\n{subject}" in f"\n{out}"
    assert "not installed" in out


@pytest.mark.parametrize(
    ("memory", "model"), [(24.0, "gpt-oss:20b"), (9.0, "qwen3:8b"), (4.0, "qwen3:1.7b"), (1.0, "none of the course's")]
)
def test_doctor_names_the_model_that_fits(memory, model):
    machine = settings.Machine("Linux", "3.12", 2, memory, memory, 50.0, None, 0.0, ())
    finding = doctor._ollama_model(machine, ollama.Server(None, None))
    assert finding.found.startswith(model)


def test_doctor_compares_with_the_lock(tmp_path, monkeypatch):
    lock = tmp_path / "requirements.lock"
    lock.write_text("# comment\nnumpy==0.0.1\nno-such-package==1.0\nwin-only==1 ; sys_platform == 'nowhere'\n")
    monkeypatch.setattr(settings, "LOCK", lock)
    different = doctor.lock_differences()
    assert [line.split()[0] for line in different] == ["numpy", "no-such-package"]
    assert "missing" in different[1]


def test_memory_that_runs_out_is_one_sentence(docs, monkeypatch, capsys):
    def load(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("helpers.llms.load_llm", load)
    assert main(["ask", "Who?", "--docs", str(docs)]) == 2
    assert "helpers: Memory ran out: take a smaller model" in capsys.readouterr().err


def test_what_goes_into_a_file_is_utf8_whatever_the_system_writes(docs):
    """Windows gives a file or pipe a code page of 256 characters."""
    (docs / "sea.txt").write_text("The swell of Corvejón is ≥ 4 metres − in winter.", encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "helpers", "ask", "How high is the swell of Corvejón?", "--docs", str(docs)]
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment, check=True)
    assert "≥ 4 metres − in winter" in done.stdout.decode("utf-8")


def test_auto_in_the_environment_is_auto(docs, monkeypatch, capsys):
    monkeypatch.setenv("HELPERS_LLM", "auto")
    monkeypatch.setattr(ollama, "find_binary", lambda: None)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # nothing listens there
    assert main(["ask", "Who feeds the goat of Corvejón?", "--docs", str(docs)]) == 0
    assert "feeds it at dawn" in capsys.readouterr().out


def test_a_wrong_model_is_said_before_anything_is_embedded(docs, monkeypatch, capsys):
    monkeypatch.setattr("helpers.__main__._open", lambda *_: pytest.fail("the folder was indexed"))
    assert main(["ask", "Who?", "--docs", str(docs), "--llm", "tinny"]) == 2
    assert "llm is 'tinny'" in capsys.readouterr().err


def test_questions_about_other_documents_are_not_recorded(docs, tmp_path, capsys):
    assert main(["record", "--llm", "quotes", "--docs", str(docs), "--out", str(tmp_path / "out")]) == 2
    assert "questions.jsonl doesn't fit the documents" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/answers_*"))


def test_a_split_without_questions_is_said(docs, tmp_path, capsys):
    row = {"id": "1", "language": "en", "question": "Who?", "answers": ["Ana"], "file": "goat.txt", "page": 1}
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps(row | {"kind": "fact", "split": "dev"}), encoding="utf-8")
    assert main(["evaluate", str(mine), "--docs", str(docs)]) == 2
    assert "mine.jsonl has no question of the split 'test'" in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_it_without_a_word(docs):
    """As `python -m helpers index | head -1` does: the pipe is closed before the first line."""
    command = [sys.executable, "-m", "helpers", "index", "--docs", str(docs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 0 and "Broken pipe" not in said and "Traceback" not in said
