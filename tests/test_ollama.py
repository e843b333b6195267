"""The Ollama server's life with real processes, and each way an answer can go wrong, against the stand-in."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import closing, nullcontext, suppress

import httpx
import ollama as client_library
import psutil
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from ollama_stand_in import LIBRARY, MODES, VERSION, Handler, SomethingElse, StandIn, digest, write_program

from helpers import doctor, ollama, settings
from helpers.llms import CUT, load_llm
from helpers.ollama import Ollama, OllamaError, check_final, explain

MODEL = "gpt-oss:20b"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """No Ollama of this machine, no proxy and no log outside the test's folder."""
    for name in ("OLLAMA_HOST", "OLLAMA_API_KEY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(ollama, "PLACES", [])
    monkeypatch.setattr(settings, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    # Each client reads all certificates anew, a third of the time of these tests; here nobody speaks https.
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)


@pytest.fixture
def stand_in(monkeypatch):
    """A server that ran before, on OLLAMA_HOST."""
    with StandIn() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        yield server


@pytest.fixture
def port(monkeypatch):
    """A free port of this machine, on OLLAMA_HOST."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{number}")
    return number


@pytest.fixture
def program(monkeypatch, tmp_path):
    """An `ollama` on PATH, whose `serve` is the stand-in as a process of its own."""
    path = write_program(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    yield path
    for process in psutil.process_iter(["cmdline"]):  # what a failed test has left
        if str(path) in (process.info["cmdline"] or ()):
            process.kill()


@pytest.fixture
def another_service():
    """The address of something else that speaks HTTP."""
    from http.server import ThreadingHTTPServer

    with ThreadingHTTPServer(("127.0.0.1", 0), SomethingElse) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def refused(kind, said, call, *arguments, **options):
    """Run a call that must raise `kind` with each part of `said` (split at '|') in one sentence of its message."""
    with pytest.raises(OllamaError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert type(caught.value) is kind, (type(caught.value), message)
    for part in said.split("|"):
        assert part in message, message
    assert "\n" not in message and len(message) < 600 and message.endswith("."), message
    return message


def ask(text="Who keeps the light of Roca Tordo?", **options):
    """Ask as the generation does: stream, explain what is raised, check the last line; return the whole message."""
    options = {"num_ctx": 512, "timeout": 5.0} | options
    server, whole = Ollama(options.pop("host", None)), None
    model = server.chat_model(options.pop("model", MODEL), **options)
    messages = text if isinstance(text, list) else [HumanMessage(text)]
    estimate = sum(len(message.content) // 4 + 4 for message in messages)
    try:
        with closing(model.stream(messages)) as stream:
            for chunk in stream:
                whole = chunk if whole is None else whole + chunk
    except Exception as error:
        raise explain(error, model.model, server.url) from error
    check_final(whole.response_metadata, whole.content, estimate, options["num_ctx"])
    return whole


def eventually(condition, seconds=5.0):
    """Return whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def log_of(port):
    return settings.RUNS / f"ollama_{port}.log"


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Addresses


@pytest.mark.parametrize(
    ("named", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("gpu", "http://gpu:11434"),
        ("gpu:8080", "http://gpu:8080"),
        (":8080", "http://127.0.0.1:8080"),
        ("1.2.3.4:56789", "http://1.2.3.4:56789"),
        ("http://gpu", "http://gpu:80"),
        ("https://gpu", "https://gpu:443"),
        ("HTTP://gpu", "http://gpu:80"),
        ("https://gpu:8443/ollama/", "https://gpu:8443/ollama"),
        ("gpu/", "http://gpu:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:8080", "http://127.0.0.1:8080"),
        ("http://0.0.0.0:8080", "http://127.0.0.1:8080"),
        ("::", "http://[::1]:11434"),
        ("[::]:8080", "http://[::1]:8080"),
        ("::1", "http://[::1]:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("[2001:db8::1]:8080", "http://[2001:db8::1]:8080"),
        (' "127.0.0.1:8080" ', "http://127.0.0.1:8080"),
        ("ollama.com", "https://ollama.com:443"),
    ],
)
def test_ollama_host_is_read_as_the_real_client_reads_it(monkeypatch, named, url):
    monkeypatch.setenv("OLLAMA_HOST", named)
    assert Ollama().url == url == ollama.address()
    monkeypatch.setenv("OLLAMA_HOST", "elsewhere:1")
    assert Ollama(named).url == (url if named else "http://elsewhere:1")
    asked = Ollama(url).chat_model(MODEL, num_ctx=512, reasoning=False)._client._client.base_url
    assert str(asked).rstrip("/") == str(httpx.URL(url))


@pytest.mark.parametrize(
    "named",
    [*"gpu:99999 gpu:port ftp://gpu gpu:0 user:secret@gpu [::1 [a:b] 1:2:3 a..b .gpu".split(), "a b", "x" * 64],
)
def test_what_is_no_address_is_said(monkeypatch, named):
    message = refused(ollama.NoServer, "`host` is no address|127.0.0.1:11434", Ollama, named)
    assert "secret" not in message
    monkeypatch.setenv("OLLAMA_HOST", named)
    refused(ollama.NoServer, "OLLAMA_HOST is no address", Ollama)
    assert "OLLAMA_HOST" in ollama.look().problem


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_this_machine_is_asked_without_a_proxy(host):
    assert Ollama(host).chat_model(MODEL, num_ctx=512, reasoning=False).client_kwargs["trust_env"] is False


@pytest.mark.parametrize("host", ["gpu", "127.0.0.1.example.com", "localhost.example.com", "10.0.0.1"])
def test_another_machine_is_asked_as_the_environment_says(host):
    options = Ollama(host).chat_model(MODEL, num_ctx=512, reasoning=False, timeout=99.0).client_kwargs
    assert options["trust_env"] is True
    assert options["timeout"] == (5.0, 99.0, 99.0, 99.0)  # a machine that is off is not waited for as long


def test_a_proxy_is_not_asked_for_this_machine(stand_in, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert Ollama().version() == VERSION and Ollama().models() and ask().content


# The server's life


@pytest.mark.parametrize(
    ("system", "command"),
    [("linux", "install.sh"), ("darwin", "brew install ollama"), ("win32", "winget install Ollama.Ollama")],
)
def test_not_installed_names_the_command_for_the_system(monkeypatch, port, system, command):
    monkeypatch.setattr(sys, "platform", system)
    refused(ollama.NotInstalled, f"not installed|{command}|https://ollama.com/download", Ollama().start)


def test_the_program_is_found_on_path_or_where_installers_put_it(monkeypatch, tmp_path, program):
    assert ollama.find_binary() == str(program)
    monkeypatch.setenv("PATH", "/nowhere")
    assert ollama.find_binary() is None
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ollama, "PLACES", ["/nowhere/ollama", "~/bin/ollama"])
    assert ollama.find_binary() == str(program)


def test_a_server_that_runs_is_reused_and_never_stopped(stand_in, program):
    server = Ollama()
    assert server.start() is False and server.process is None
    server.stop()
    assert server.version() == VERSION


def test_start_waits_for_an_answer_and_stop_ends_what_was_started(port, program, monkeypatch):
    monkeypatch.setenv("STAND_IN_DELAY", "0.5")  # it listens, and looks for GPUs
    monkeypatch.setattr(ollama, "PROBE_SECONDS", 0.1)
    server = Ollama()
    assert server.version() is None
    assert server.start() is True
    process = psutil.Process(server.process.pid)
    assert server.version() == VERSION and process.cmdline()[-1] == "serve"
    assert os.getsid(process.pid) == process.pid != os.getsid(0)  # Ctrl-C in this terminal doesn't reach it
    assert f"Listening on 127.0.0.1:{port}" in log_of(port).read_text(encoding="utf-8")
    assert server.start() is True and server.process.pid == process.pid
    another = Ollama()
    assert another.start() is False
    another.stop()
    assert server.version() == VERSION
    server.stop()
    assert not alive(process.pid) and server.version() is None and server.process is None
    server.stop()  # a second time it does nothing
    assert server.start() is True  # and it can be started again
    server.stop()


@pytest.mark.parametrize("stubborn", ["", "1"])
def test_stop_ends_the_runners_too_and_what_ignores_sigterm(port, program, monkeypatch, tmp_path, stubborn):
    monkeypatch.setenv("STAND_IN_RUNNER", str(tmp_path / "pids"))
    monkeypatch.setenv("STAND_IN_STUBBORN", stubborn)
    monkeypatch.setattr(ollama, "STOP_SECONDS", 0.3)
    server = Ollama()
    server.start()
    pids = [int(pid) for pid in (tmp_path / "pids").read_text(encoding="utf-8").split()]
    assert pids[0] == server.process.pid and all(map(alive, pids))
    server.stop()
    assert eventually(lambda: not any(map(alive, pids)))


def test_a_server_that_has_ended_is_not_signalled(port, program, monkeypatch):
    server = Ollama()
    server.start()
    server.process.kill()
    server.process.wait()  # from here on its number may be given to another process
    monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("another process was signalled"))
    server.stop()
    assert server.process is None


def test_a_server_of_ours_that_died_is_started_again(port, program):
    server = Ollama()
    server.start()
    first = server.process
    first.kill()
    first.wait()
    try:
        assert server.start() is True and server.process.pid != first.pid and server.version() == VERSION
    finally:
        server.stop()


def test_two_threads_start_one_server(port, program, monkeypatch):
    server, launched, started = Ollama(), [], []
    version, launch = server.version, server._launch
    both = threading.Barrier(2)

    def meeting():
        found = version()
        with suppress(threading.BrokenBarrierError):  # both see that none answers, where nothing keeps them apart
            both.wait(0.3)
        return found

    monkeypatch.setattr(server, "version", meeting)
    monkeypatch.setattr(server, "_launch", lambda: (launched.append(1), launch()))
    threads = [threading.Thread(target=lambda: started.append(server.start())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.stop()
    assert started == [True, True] and launched == [1]


def test_each_port_has_its_log(port, program):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        second = probe.getsockname()[1]
    servers = Ollama(), Ollama(port_of(second))
    try:
        assert [server.start() for server in servers] == [True, True]
        for number in (port, second):
            assert f"Listening on {port_of(number)}" in log_of(number).read_text(encoding="utf-8")
    finally:
        for server in servers:
            server.stop()


def test_a_dead_process_is_not_taken_for_the_server_that_answers(port, program, monkeypatch):
    """Another's server wins the port, and answers between two polls of ours."""
    monkeypatch.setenv("STAND_IN_EXIT", "address already in use")
    server = Ollama()
    answers = iter([None, VERSION])

    def version():
        if server.process:
            server.process.wait()
        return next(answers)

    monkeypatch.setattr(server, "version", version)
    assert server.start() is False and server.process is None


def test_the_settings_that_messages_name_can_be_set():
    said = " ".join(
        [*(t for t in vars(ollama).values() if isinstance(t, str)), *(r[-1] for r in ollama.REPLIES + ollama.PULLS)]
    )
    named = set(re.findall(r"settings\.(\w+)", said))
    assert {"OLLAMA_SECONDS", "OLLAMA_CONTEXT"} <= named and all(hasattr(settings, name) for name in named)


def test_a_server_that_dies_is_said_with_its_last_line(port, program, monkeypatch):
    monkeypatch.setenv("STAND_IN_EXIT", "$HOME is not defined")
    server = Ollama()
    refused(ollama.NoServer, f"ended with code 1|Error: $HOME is not defined|{log_of(port)}", server.start)
    assert server.process is None


def test_a_server_that_never_answers_is_ended(port, program, monkeypatch, tmp_path):
    monkeypatch.setenv("STAND_IN_DELAY", "60")
    monkeypatch.setenv("STAND_IN_RUNNER", str(tmp_path / "pids"))
    monkeypatch.setattr(ollama, "PROBE_SECONDS", 0.1)
    refused(ollama.NoServer, "did not answer in time|Listening on", Ollama().start, seconds=1.0)
    assert not alive(int((tmp_path / "pids").read_text(encoding="utf-8").split()[0]))


def test_ctrl_c_while_waiting_ends_what_was_started(port, program, monkeypatch):
    monkeypatch.setattr(ollama, "PROBE_SECONDS", 0.1)
    monkeypatch.setenv("STAND_IN_DELAY", "60")
    server, started = Ollama(), []

    def interrupted(seconds):
        if server.process:
            started.append(server.process.pid)
            raise KeyboardInterrupt

    monkeypatch.setattr(ollama.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.start()
    monkeypatch.undo()
    assert started and eventually(lambda: not alive(started[0]))


def test_a_program_that_cannot_be_run_is_said(port, program):
    program.write_text("not a program", encoding="utf-8")
    refused(ollama.NoServer, "could not be started|Exec format error", Ollama().start)


def test_a_race_for_the_port_is_won_by_one_and_used_by_both(port, program, monkeypatch):
    """Between the probe and the start another begins to serve: ours finds the port taken, and the other's is used."""
    server, other = Ollama(), []
    launch = server._launch

    def late():
        other.append(StandIn(port=port).__enter__())
        launch()

    monkeypatch.setattr(server, "_launch", late)
    answers = iter([None, None, None])
    real = server.version
    monkeypatch.setattr(server, "version", lambda: next(answers) if server.process is None else waited(server, real))
    try:
        assert server.start() is False and server.process is None
        assert "address already in use" in log_of(port).read_text(encoding="utf-8")
        server.stop()
        assert real() == VERSION
    finally:
        other[0].__exit__()


def waited(server, version):
    """Answer only when the process has ended, so that `start` sees both."""
    return version() if server.process.returncode is not None else None


def test_another_service_on_the_port_is_told_from_ollama(another_service, monkeypatch, program):
    port = another_service.rpartition(":")[2]
    for status in (200, 404, 500):
        monkeypatch.setattr(SomethingElse, "status", status)
        refused(
            ollama.PortTaken,
            f"{another_service} is not Ollama|lsof -i :{port}|OLLAMA_HOST",
            Ollama(port_of(port)).start,
        )
        for call in (Ollama(port_of(port)).models, lambda: ask(host=another_service)):
            refused(ollama.PortTaken, "is not Ollama", call)
    monkeypatch.setenv("OLLAMA_HOST", another_service)
    assert "is not Ollama" in ollama.look().problem


def port_of(port):
    return f"127.0.0.1:{port}"


@pytest.mark.parametrize("greets", [True, False])
def test_what_speaks_no_http_is_told_from_ollama(program, monkeypatch, greets):
    monkeypatch.setattr(ollama, "PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(1)

        def speak():
            with suppress(TimeoutError):  # nobody connects any more
                while True:
                    connection, _ = listener.accept()
                    with connection, suppress(ConnectionError):
                        if greets:
                            connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                        if connection.recv(1000) and not greets:
                            connection.sendall(b"-ERR unknown command\r\n")

        thread = threading.Thread(target=speak)
        thread.start()
        refused(ollama.PortTaken, "is not Ollama", Ollama(f":{listener.getsockname()[1]}").start)
        thread.join()


def test_what_listens_in_silence_is_waited_for_and_then_said(program, monkeypatch):
    monkeypatch.setattr(ollama, "PROBE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Ollama(f":{listener.getsockname()[1]}")
        begun = time.monotonic()
        refused(ollama.TooSlow, "is silent|Ollama starting|lsof", server.start, seconds=0.5)
        assert time.monotonic() - begun >= 0.5 and server.process is None


@pytest.mark.parametrize(
    ("what", "first", "then"), [("version_delay", 60.0, 0.0), ("before", "shut", ""), ("before", "reset", "")]
)
def test_one_that_another_has_just_started_is_waited_for(stand_in, monkeypatch, program, what, first, then):
    monkeypatch.setattr(ollama, "PROBE_SECONDS", 0.1)
    setattr(stand_in, what, first)
    refused(ollama.TooSlow, "is silent|Ollama starting", Ollama().start, seconds=0.1)
    threading.Timer(0.4, setattr, (stand_in, what, then)).start()
    assert Ollama().start(seconds=10) is False


@pytest.mark.parametrize("before", ["key", "moved"])
def test_a_server_behind_something_is_asked_as_the_client_library_asks(stand_in, monkeypatch, before):
    monkeypatch.setenv("OLLAMA_API_KEY", "secret")
    stand_in.before = before
    assert Ollama().version() == VERSION and Ollama().start() is False and MODEL in ollama.look().models


@pytest.mark.parametrize("host", ["192.0.2.1:11434", "https://127.0.0.1:{}", "127.0.0.1:{}/ollama"])
def test_none_is_started_elsewhere_than_on_this_machine(port, program, monkeypatch, host):
    monkeypatch.setattr(ollama, "PROBE_SECONDS", 0.2)
    refused(ollama.NoServer, "No Ollama answers at|ollama serve|OLLAMA_HOST", Ollama(host.format(port)).start)
    assert not settings.RUNS.exists()


def test_a_server_that_listens_everywhere_is_started_on_loopback_only(port, program, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", f"0.0.0.0:{port}")
    server = Ollama()
    try:
        assert server.start() is True
        listening = [c.laddr.ip for c in psutil.Process(server.process.pid).net_connections() if c.status == "LISTEN"]
        assert listening == ["127.0.0.1"]
    finally:
        server.stop()


def test_look_says_what_is_there(stand_in, program, monkeypatch, port):
    monkeypatch.setenv("OLLAMA_HOST", stand_in.url)
    found = ollama.look()
    assert found == ollama.Server(str(program), ("gpt-oss:20b", "plain:1b"))
    assert "gpt-oss:20b" in doctor._ollama(found).found
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")
    assert ollama.look() == ollama.Server(str(program), None)
    assert doctor._ollama(ollama.look()).mend == "ollama serve"


def test_the_doctor_says_what_holds_the_port(another_service, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", another_service)
    assert "is not Ollama" in doctor._ollama(ollama.look()).found


# The end of this process, with real processes

CHILD = """
import os, signal, sys, time
from pathlib import Path
from helpers import ollama, settings
settings.RUNS = Path({runs!r})
server = ollama.Ollama()
print(server.start(), server.process.pid if server.process else 0, flush=True)
{then}
"""
ENDS = {
    "end": "",
    "exit": "sys.exit(3)",
    "error": "raise RuntimeError('boom')",
    "interrupt": "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
    "terminate": "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
    "terminal closed": "os.kill(os.getpid(), signal.SIGHUP); time.sleep(60)",
    "ctrl-backslash": "os.kill(os.getpid(), signal.SIGQUIT); time.sleep(60)",
}


def run_child(then):
    """Run a process that starts Ollama; return what it printed."""
    code = CHILD.format(runs=str(settings.RUNS), then=then)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=settings.ROOT, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("how", ENDS)
def test_what_we_started_is_gone_when_this_process_is(port, program, how):
    done = run_child(ENDS[how])
    started, pid = done.stdout.split()
    assert started == "True", done.stderr
    assert not alive(int(pid)) and Ollama().version() is None


@pytest.mark.parametrize("then", ["server.stop()", ""])
def test_ctrl_c_while_the_server_is_ended_leaves_nothing(port, program, monkeypatch, then):
    """In `stop`, and in what runs at exit; the server ignores SIGTERM."""
    monkeypatch.setenv("STAND_IN_STUBBORN", "1")
    soon = "import subprocess; subprocess.Popen(['sh', '-c', f'sleep 1; kill -INT {os.getpid()}'])"
    done = run_child(f"{soon}; ollama.STOP_SECONDS = 20; {then}")
    assert "KeyboardInterrupt" in done.stderr
    assert eventually(lambda: not alive(int(done.stdout.split()[1])))


def test_a_fork_of_this_process_leaves_the_server_alone(port, program):
    then = """
child = os.fork()
if child == 0:
    sys.exit(0)  # runs what is registered to run at exit
os.waitpid(child, 0)
print(server.version(), flush=True)
"""
    done = run_child(then)
    assert done.stdout.split()[0] == "True" and done.stdout.split()[2] == VERSION, done.stderr
    assert Ollama().version() is None


@pytest.mark.parametrize("how", ["end", "error", "terminate"])
def test_one_that_ran_before_is_not_touched(port, program, how):
    with subprocess.Popen([program, "serve"], stderr=subprocess.DEVNULL) as before:
        try:
            assert eventually(lambda: Ollama().version() == VERSION)
            assert run_child(f"server.stop(); {ENDS[how]}").stdout.split() == ["False", "0"]
            assert before.poll() is None and Ollama().version() == VERSION
        finally:
            before.terminate()


# Models


def test_models_digests_capabilities_and_what_is_loaded(stand_in):
    server = Ollama()
    assert server.models() == ("gpt-oss:20b", "plain:1b")
    assert server.digest(MODEL) == digest(MODEL) == server.require(MODEL)
    assert "thinking" in server.capabilities(MODEL) and "thinking" not in server.capabilities("plain:1b")
    assert server.loaded() == []
    server.warm_up(MODEL, 2048)
    (loaded,) = server.loaded()
    assert (loaded.model, loaded.context_length, loaded.size) == (MODEL, 2048, LIBRARY[MODEL])
    (body,) = stand_in.asked("/api/generate")
    assert not body.get("prompt") and body["options"] == {"num_ctx": 2048} and body["keep_alive"] == ollama.KEEP_ALIVE
    ask(num_ctx=2048)
    assert server.loaded()[0].context_length == 2048  # a question with another num_ctx would load the model anew


def test_a_name_without_a_tag_means_latest(stand_in):
    stand_in.models["mine:latest"] = 1
    assert Ollama().digest("mine") == Ollama().digest("Mine:Latest") == digest("mine:latest")
    refused(ollama.ModelMissing, "gpt-oss", Ollama().digest, "gpt-oss")


def test_a_missing_model_names_the_command_and_smaller_ones(stand_in):
    del stand_in.models[MODEL]
    server = Ollama()
    calls = [server.digest, server.require, server.capabilities, lambda name: server.warm_up(name, 512)]
    for call in [*calls, lambda name: ask(model=name)]:
        refused(ollama.ModelMissing, f"ollama pull {MODEL}`|pull=True|qwen3:8b (5.2 GB)|qwen3:0.6b", call, MODEL)
    message = refused(ollama.ModelMissing, "ollama pull qwen3:1.7b`|qwen3:0.6b", server.require, "qwen3:1.7b")
    assert "qwen3:8b" not in message  # only smaller ones are named
    assert "smaller" not in refused(ollama.ModelMissing, "qwen3:0.6b", server.require, "qwen3:0.6b")
    assert stand_in.asked("/api/pull") == []  # nothing is fetched unasked


def test_a_model_of_which_nothing_is_known_has_no_smaller_one(stand_in):
    message = refused(ollama.ModelMissing, "pull tinyllama:1.1b`", Ollama().require, "tinyllama:1.1b")
    assert "smaller" not in message
    refused(ollama.ModelMissing, "smaller model: qwen3:0.6b", Ollama().require, "library/qwen3:1.7b")
    stand_in.chat = "memory"
    assert "smaller" not in refused(ollama.OutOfMemory, "OLLAMA_CONTEXT.", Ollama().warm_up, "plain:1b", 512)


def test_a_model_without_a_name_is_passed_over(stand_in, monkeypatch):
    listed = {"models": [{"name": "x:latest", "digest": "d"}, {"model": "plain:1b", "digest": "e"}]}
    monkeypatch.setattr(Handler, "tags", lambda handler: handler.reply(listed))
    assert Ollama().models() == ("plain:1b",) and Ollama().require("plain:1b") == "e"
    refused(ollama.ModelMissing, "has no x", Ollama().require, "x")


class Bar:
    """What a progress bar was told."""

    seen = None

    def __init__(self, desc, disable, **_):
        self.desc, self.disable, self.n, self.total, self.points = desc, disable, 0, None, []
        Bar.seen = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.points.append("closed")

    def refresh(self):
        self.points.append((self.n, self.total))


def test_pull_fetches_with_progress_only_when_told_to(stand_in, monkeypatch):
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    server = Ollama()
    assert server.require("qwen3:0.6b", pull=True) == digest("qwen3:0.6b")
    assert "qwen3:0.6b" in server.models()
    bar, size = Bar.seen, LIBRARY["qwen3:0.6b"]
    assert bar.desc == "qwen3:0.6b" and not bar.disable
    assert bar.points[0] == (0, size) and bar.points[-2:] == [(size + 1000, size + 1000), "closed"]
    assert bar.points[:-1] == sorted(bar.points[:-1])
    server.require("qwen3:0.6b", pull=True)
    assert len(stand_in.asked("/api/pull")) == 1  # what is there is not fetched again


@pytest.mark.parametrize("library", ["library/", "registry.ollama.ai/library/"])
def test_a_name_with_the_library_is_that_of_the_model(stand_in, library):
    name, server = f"{library}qwen3:0.6b", Ollama()
    assert server.require(name, pull=True) == server.require(name) == server.require("qwen3:0.6b")
    assert len(stand_in.asked("/api/pull")) == 1 and ask(model=name).content


def test_pull_can_be_quiet(stand_in, capfd):
    Ollama().pull("qwen3:0.6b", progress=False)
    assert capfd.readouterr() == ("", "")
    Ollama().pull("qwen3:0.6b")
    assert "qwen3:0.6b" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("how", "said"),
    [("die", "Connection reset by peer"), ("error", "max retries exceeded: EOF"), ("end", "it ended at 'pulling ")],
)
def test_a_pull_that_breaks_off_is_said_and_goes_on_when_run_again(stand_in, how, said, monkeypatch):
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    stand_in.pull_breaks = how
    server = Ollama()
    said = f"was not fetched|{said}|`ollama pull qwen3:0.6b` goes on where it stopped"
    refused(ollama.PullFailed, said, server.require, "qwen3:0.6b", pull=True)
    assert "qwen3:0.6b" not in server.models() and Bar.seen.points[-1] == "closed"
    server.require("qwen3:0.6b", pull=True)
    assert Bar.seen.points[1][0] > LIBRARY["qwen3:0.6b"] // 2  # it began where the first stopped
    assert "qwen3:0.6b" in server.models()


@pytest.mark.parametrize(
    ("breaks", "name", "said"),
    [
        ("", "gtp-oss", "no gtp-oss|https://ollama.com/library"),
        ("", "gpt oss", "no gpt oss|https://ollama.com/library"),
        ("old", "qwen3:0.6b", "qwen3:0.6b needs a newer Ollama|https://ollama.com/download"),
        ("full", "qwen3:0.6b", "no space left on device: free space there, then `ollama pull qwen3:0.6b` goes on"),
    ],
)
def test_a_pull_that_must_fail_says_what_mends_it(stand_in, breaks, name, said):
    stand_in.pull_breaks = breaks
    message = refused(ollama.PullFailed, said, Ollama().pull, name, progress=False)
    assert "where it stopped" not in message


def test_a_pull_without_a_server_is_said(port):
    refused(ollama.NoServer, "No Ollama answers", Ollama().pull, MODEL, progress=False)


def test_ctrl_c_ends_a_pull(stand_in, monkeypatch):
    stand_in.pull_delay = 0.05

    class Interrupting(Bar):
        def refresh(self):
            if self.n:
                raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.auto.tqdm", Interrupting)
    with pytest.raises(KeyboardInterrupt) as held:  # and with it, as in a notebook, all that the pull was about
        Ollama().pull("qwen3:0.6b")
    assert held and stand_in.gone.wait(2) and Bar.seen.points == ["closed"]


# Answers


def test_an_answer_streams_with_its_thinking_apart(stand_in):
    whole = ask("Who keeps the light?")
    assert whole.content == "You said: Who keeps the light?"
    assert whole.additional_kwargs["reasoning_content"] == "Let me see."
    assert whole.response_metadata["done_reason"] == "stop" and whole.usage_metadata["input_tokens"] == 9


def test_the_request_carries_what_the_answer_depends_on(stand_in):
    ask(num_ctx=2048, seed=7, temperature=0.5, num_predict=99)
    (body,) = stand_in.asked("/api/chat")
    assert body["options"] == {"num_ctx": 2048, "seed": 7, "temperature": 0.5, "num_predict": 99}
    assert (body["think"], body["keep_alive"], body["stream"]) == ("low", ollama.KEEP_ALIVE, True)
    ask(model="plain:1b")
    body = stand_in.asked("/api/chat")[1]
    assert "think" not in body and body["options"] == {"num_ctx": 512, "seed": 0, "temperature": 0.0}
    stand_in.models["qwen3:0.6b"] = 1
    for reasoning, think in ((None, False), (True, True)):  # it thinks only when told to
        whole = ask(model="qwen3:0.6b", reasoning=reasoning)
        assert stand_in.asked("/api/chat")[-1]["think"] is think
        assert bool(whole.additional_kwargs.get("reasoning_content")) is think


def test_a_slow_first_token_is_waited_for(stand_in):
    stand_in.chat, stand_in.delay = "slow", 0.5
    begun = time.monotonic()
    assert ask().content and time.monotonic() - begun >= 0.5


WRONG = {
    "silent": (
        ollama.TooSlow,
        "said nothing in time|ollama ps|raise settings.OLLAMA_SECONDS, or take a smaller model: qwen3:8b",
    ),
    "die": (ollama.BrokenStream, "broke off|ask again|log"),
    "vanish": (ollama.BrokenStream, "broke off|incomplete chunked read"),
    "unfinished": (ollama.BrokenStream, "without its last line|ask again"),
    "error": (ollama.ServerFault, "reports: an error was encountered while running the model: unexpected EOF|log"),
    "fail": (ollama.ServerFault, "exit status 2|ask again"),
    "memory": (ollama.OutOfMemory, "doesn't fit in memory|13.1 GiB|lower settings.OLLAMA_CONTEXT|qwen3:8b (5.2 GB)"),
    "killed": (ollama.OutOfMemory, "doesn't fit in memory|signal: killed"),
    "busy": (ollama.TooSlow, "Too many questions wait|ask again in a minute"),
    "malformed": (ollama.BrokenStream, "not of Ollama's protocol|\"assis|update Ollama"),
    "page": (ollama.PortTaken, "is not Ollama"),
    "list": (ollama.BrokenStream, "not of Ollama's protocol"),
    "odd": (ollama.BrokenStream, "not of Ollama's protocol"),
    "cut": (ollama.PromptCut, "read 6 of about 12 tokens|num_ctx is 512|`ollama ps`|update Ollama"),
    "uncounted": (ollama.PromptCut, "read 0 of about 12 tokens|update Ollama"),
    "length": (ollama.NoText, "ran out of tokens while thinking|raise settings.THINKING_TOKENS"),
    "empty": (ollama.NoText, "answered with nothing|ask again"),
}


@pytest.mark.parametrize("mode", WRONG)
def test_whatever_goes_wrong_is_one_sentence(stand_in, mode):
    stand_in.chat = mode
    kind, said = WRONG[mode]
    begun = time.monotonic()
    refused(kind, said, ask, timeout=0.3 if mode == "silent" else 5.0)
    assert time.monotonic() - begun < 3
    stand_in.chat = "answer"  # and the next question is answered
    assert ask("Again?").content == "You said: Again?"


def test_every_way_to_go_wrong_is_tried():
    assert {*WRONG, "answer", "slow", "endless"} == MODES


def test_no_server_at_all(port):
    for call in (ask, Ollama().models, lambda: Ollama().warm_up(MODEL, 512)):
        refused(ollama.NoServer, f"No Ollama answers at http://127.0.0.1:{port}|`ollama serve`", call)


def test_a_model_that_cannot_think_says_so(stand_in):
    refused(ollama.ServerFault, "does not support thinking|reasoning=None", ask, model="plain:1b", reasoning="low")


def test_a_prompt_too_long_for_num_ctx_is_cut_by_the_server_and_refused_by_us(stand_in):
    long = "word " * 600
    refused(
        ollama.PromptCut,
        "read 258 of about 754 tokens|raise settings.OLLAMA_CONTEXT or give it fewer passages",
        ask,
        long,
    )
    assert ask(long, num_ctx=1024).content.startswith("You said")


def test_messages_that_drop_out_are_noticed(stand_in):
    history = [SystemMessage("Be brief."), HumanMessage("word " * 300), HumanMessage("word " * 250)]
    refused(ollama.PromptCut, "read 322 of about 701 tokens", ask, history)


def test_an_estimate_may_be_a_little_off():
    last = {"done": True, "prompt_eval_count": 800}
    check_final(last, "Yes.", 1400, 4096)
    check_final(last, "Yes.", 500, 4096)
    with pytest.raises(ollama.PromptCut):
        check_final(last, "Yes.", 1500, 4096)


@pytest.mark.parametrize(
    ("read", "asked", "served", "cut"),
    [
        (861, 2025, 8192, False),  # a list of telephone numbers, three digits a token
        (593, 1631, 8192, False),  # Russian
        (0, 1631, 8192, False),  # the server had read it for the last question
        (4096, 6935, 4096, True),  # servers that keep as much as fits
        (2050, 6935, 4096, True),  # and those that keep half
        (3900, 6935, 4096, False),  # the estimate was too high
        (2050, 6935, None, True),
    ],
)
def test_what_fits_the_context_that_is_served_is_not_cut(read, asked, served, cut):
    last = {"done": True, "prompt_eval_count": read}
    with pytest.raises(ollama.PromptCut) if cut else nullcontext():
        check_final(last, "Yes.", asked, 8192, served)


def test_the_context_that_is_served_is_that_of_the_model_in_memory(stand_in):
    server = Ollama()
    assert server.served_context(MODEL) is None
    ask(num_ctx=1024)
    assert server.served_context(MODEL) == 1024 and server.served_context("other:1b") is None


def test_an_answer_that_has_come_is_not_spoilt_by_a_server_that_went_since(stand_in, monkeypatch):
    def gone(self):
        raise ollama.NoServer("No Ollama answers.")

    monkeypatch.setattr(Ollama, "loaded", gone)
    asked = " ".join(["word"] * 50)
    assert "".join(load_llm(f"ollama:{MODEL}").stream([{"role": "user", "content": asked}])) == f"You said: {asked}"


def test_an_answer_that_ran_out_of_tokens_ends_in_a_mark(stand_in):
    short = load_llm("ollama:plain:1b", answer_tokens=4)
    assert "".join(short.stream([{"role": "user", "content": "one two"}])) == "You said: one two"
    assert "".join(short.stream([{"role": "user", "content": "one two three"}])) == f"You said: one two{CUT}"


def test_two_questions_at_once_are_both_answered(stand_in):
    stand_in.chat, stand_in.delay = "slow", 0.2
    answers = {}

    def one(text):
        answers[text] = ask(text).content

    threads = [threading.Thread(target=one, args=(f"Question {n}",)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {f"Question {n}": f"You said: Question {n}" for n in range(2)}


def test_one_question_too_many_is_told_to_come_back(monkeypatch):
    with StandIn(waiting=1) as server:
        server.chat = "endless"
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        with closing(Ollama().chat_model(MODEL, num_ctx=512).stream("First")) as first:
            next(first)
            refused(ollama.TooSlow, "ask again in a minute", ask)


@pytest.mark.parametrize("mode", ["endless", "silent"])
def test_a_stream_that_is_closed_ends_the_work_on_the_server(stand_in, mode):
    stand_in.chat = mode
    model = Ollama().chat_model(MODEL, num_ctx=512, timeout=0.3)
    if mode == "silent":
        with pytest.raises(httpx.ReadTimeout):
            next(model.stream("Endless?"))
    else:
        stream = model.stream("Endless?")
        next(stream)
        assert not stand_in.gone.is_set()
        stream.close()
    assert stand_in.gone.wait(2)


CHAT = """
import os, signal, sys, threading
from contextlib import closing
from helpers.ollama import Ollama
model = Ollama().chat_model("gpt-oss:20b", num_ctx=512)
for question in ("Endless?", "And now?"):
    words = 0
    try:
        with closing(model.stream(question)) as stream:
            for chunk in stream:
                words += bool(chunk.content)
                if words == 3:
                    print("streaming", flush=True)
        print("answered", flush=True)
    except KeyboardInterrupt:
        print("stopped", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("mode", ["endless", "silent"])
def test_ctrl_c_closes_the_stream_and_not_the_program(stand_in, mode):
    """In the middle of the words, and while nothing has come yet."""
    stand_in.chat = mode
    child = subprocess.Popen(
        [sys.executable, "-c", CHAT], cwd=settings.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        try:
            if mode == "endless":
                assert child.stdout.readline() == "streaming\n"
            assert eventually(lambda: stand_in.asked("/api/chat"), 20)
            time.sleep(0.2)
            assert not stand_in.gone.is_set()
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "stopped\n"
            assert stand_in.gone.wait(2)  # the server saw the client leave
            stand_in.chat = "answer"
            out, _ = child.communicate("\n", timeout=20)
            assert out.split()[-1] == "answered" and child.returncode == 0
        finally:
            child.kill()


# What the libraries raise


def response(error, status=500):
    return client_library.ResponseError(error, status)


RAISED = [
    (httpx.ConnectTimeout("timed out"), ollama.NoServer, "No Ollama answers"),
    (ConnectionError("Failed to connect to Ollama."), ollama.NoServer, "ollama serve"),
    (httpx.PoolTimeout(""), ollama.TooSlow, "said nothing in time"),
    (httpx.WriteError("broken pipe"), ollama.BrokenStream, "broken pipe"),
    (httpx.ReadError(""), ollama.BrokenStream, "ReadError"),
    (ConnectionResetError(104, "Connection reset by peer"), ollama.BrokenStream, "Connection reset by peer"),
    (httpx.DecodingError("bad gzip"), ollama.BrokenStream, "bad gzip"),
    (httpx.StreamClosed(), ollama.BrokenStream, "closed"),
    (json.JSONDecodeError("Expecting value", "{oops", 0), ollama.BrokenStream, "{oops"),
    (ValueError("No data received from Ollama stream."), ollama.BrokenStream, "No data received"),
    (AttributeError("'list' object has no attribute 'get'"), ollama.BrokenStream, "not of Ollama's protocol"),
    (TypeError("the JSON object must be str"), ollama.BrokenStream, "not of Ollama's protocol"),
    (response('{"error": "model \'x\' not found"}', 404), ollama.ModelMissing, "ollama pull x`"),
    (response('{"error": "model \\"x\\" not found, try pulling it first"}', 404), ollama.ModelMissing, "pull"),
    (response("404 page not found", 404), ollama.PortTaken, "is not Ollama"),
    (response('{"detail": "Not Found"}', 404), ollama.PortTaken, "is not Ollama"),
    (response('{"error": "cudaMalloc failed: out of memory"}'), ollama.OutOfMemory, "doesn't fit in memory"),
    (response('{"error": "unable to allocate CUDA0 buffer"}'), ollama.OutOfMemory, "lower settings.OLLAMA_CONTEXT"),
    (
        response('{"error": "model failed to load, this may be due to resource limitations or an internal error"}'),
        ollama.OutOfMemory,
        "doesn't fit in memory",
    ),
    (
        response('{"error": "the prompt is longer than the context length currently available to the model"}', 400),
        ollama.PromptCut,
        "raise settings.OLLAMA_CONTEXT",
    ),
    (
        response('{"error": "request (9000 tokens) exceeds the available context size (4096 tokens)"}', 400),
        ollama.PromptCut,
        "9000 tokens",
    ),
    (response('{"error": "unauthorized"}', 401), ollama.ServerFault, "unauthorized"),
    (response("line one\n  line two\n" * 100), ollama.ServerFault, "line one line two"),
    (client_library.RequestError("must provide a model"), ollama.BrokenStream, "must provide a model"),
]


@pytest.mark.parametrize(("error", "kind", "said"), RAISED, ids=lambda value: getattr(value, "__name__", None))
def test_whatever_the_libraries_raise_is_explained(error, kind, said):
    explained = explain(error, "x", "http://127.0.0.1:11434")
    assert type(explained) is kind and said in str(explained), explained
    assert "\n" not in str(explained) and len(str(explained)) < 600 and str(explained).endswith(".")
    assert explain(explained) is explained


def test_every_failure_is_one_exception():
    kinds = [kind for kind in vars(ollama).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 10 and all(issubclass(kind, OllamaError) for kind in kinds)
    assert issubclass(OllamaError, RuntimeError)
