"""A server that speaks Ollama's protocol on loopback and goes wrong on command, and an `ollama` that serves it.

It follows the server's source (server/routes.go, server/prompt.go) and https://docs.ollama.com/api: the paths, the
field names, the status codes and the wording of errors, chunked NDJSON, durations in nanoseconds, the cutting of long
prompts, one queue for the questions. What it answers is no model's: `StandIn.say`, a piece to a word.

    with StandIn() as server:      # on a free port of 127.0.0.1; `server.url`
        server.chat = "die"        # what the next chat does; see CHATS
        ...
        server.requests            # (path, body) of each request, in order
        server.gone                # an Event: a client left in the middle of an answer

Run as a program with the argument `serve`, it serves on OLLAMA_HOST as `ollama serve` does, see `write_program`.
"""

import hashlib
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

VERSION = "0.33.3"
DEFAULT_CONTEXT = 4096
LIBRARY = {"gpt-oss:20b": 13_780_173_839, "qwen3:0.6b": 522_653_767, "plain:1b": 815_319_791}  # what can be pulled
THINKING = {"gpt-oss:20b", "qwen3:0.6b"}
CHATS = """answer: as it should be
slow: a long silence before the first token
silent: accepted and never answered
endless: a word every few hundredths of a second until the client leaves
die: the connection is reset after some words
vanish: the connection is closed in the middle of a line
unfinished: the stream ends well, without its last line
error: an error line after some words
fail: status 500 and an error before any word
memory: the model doesn't fit
killed: its runner was killed while it loaded
busy: too many requests wait
malformed: a line that is no JSON
page: a proxy's page of HTML with status 200
list: a line that is JSON and no object
odd: a line that is an object of another kind
cut: half of the prompt is read, whatever num_ctx says
uncounted: the last line doesn't say how much was read
length: it thinks until num_predict is used up
empty: it ends at once without a word"""
MODES = {line.split(":")[0] for line in CHATS.splitlines()}


def digest(name):
    """Return the sha256 that the stand-in gives for a model."""
    return hashlib.sha256(name.encode()).hexdigest()


def tokens(message):
    """Return how many tokens the stand-in counts in a message: one to four characters, and the template's four."""
    return len(str(message.get("content") or "")) // 4 + 4


def short(name):
    """Return a model's name without the library it comes from, as the server lists it."""
    return re.sub("^(registry.ollama.ai/)?(library/)?", "", name)


class ClientLeft(ConnectionError):
    """The client closed the connection before the answer ended."""


class Handler(BaseHTTPRequestHandler):
    """One connection; `self.server.owner` is the StandIn."""

    protocol_version = "HTTP/1.1"
    error_content_type = "text/plain"

    def log_message(self, *_):
        pass

    def handle(self):
        with suppress(ConnectionError, ValueError):  # ValueError: a mode has closed the file under it
            if self.stand_in.before == "shut":
                return self.hang_up(reset=False)
            super().handle()

    @property
    def stand_in(self):
        return self.server.owner

    def do_GET(self):
        before, path = self.stand_in.before, self.path.removeprefix("/moved")
        self.stand_in.requests.append((path, None))
        if before == "reset":
            return self.hang_up()
        if before == "key" and self.headers.get("Authorization") != "Bearer secret":
            return self.reply({"error": "unauthorized"}, 401)
        if before == "moved" and path == self.path:
            self.send_response(307)
            self.send_header("Location", f"/moved{path}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        paths = {"/": self.root, "/api/version": self.version, "/api/tags": self.tags, "/api/ps": self.ps}
        return paths.get(path, self.not_found)()

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(raw)
        except ValueError as error:
            return self.reply({"error": str(error) if raw else "missing request body"}, 400)
        self.stand_in.requests.append((self.path, body))
        paths = {"/api/chat": self.chat, "/api/generate": self.generate, "/api/show": self.show, "/api/pull": self.pull}
        if self.path not in paths:
            return self.not_found()
        try:
            return paths[self.path](body)
        except ConnectionError:  # ClientLeft, or a reset because the client left something unread
            self.close_connection = True
            if not self.stand_in.closing:
                self.stand_in.gone.set()

    # What it sends

    def reply(self, body, status=200):
        """Send one JSON object."""
        self.send_bytes(json.dumps(body).encode(), status, "application/json; charset=utf-8")

    def send_bytes(self, content, status, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def not_found(self):
        self.send_bytes(b"404 page not found", 404, "text/plain")

    def begin(self):
        """Begin a stream."""
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def line(self, content):
        """Send one line of a stream as one chunk: an object, or text as it is."""
        data = (content if isinstance(content, str) else json.dumps(content)).encode() + b"\n"
        try:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
        except OSError:
            raise ClientLeft from None

    def end(self):
        try:
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            raise ClientLeft from None

    def hang_up(self, reset=True):
        """Break the connection off: with a reset, as when the server's machine kills it, or by closing it."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.rfile.close()
        with suppress(OSError):
            self.wfile.close()
        self.connection.close()

    def wait(self, seconds):
        """Wait; raise ClientLeft as soon as the client closes the connection, and also when the stand-in closes."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            readable, _, _ = select.select([self.connection], [], [], min(left, 0.02))
            if self.stand_in.closing or (readable and self.connection.recv(1, socket.MSG_PEEK) == b""):
                raise ClientLeft

    # The paths

    def root(self):
        self.send_bytes(b"Ollama is running", 200, "text/plain; charset=utf-8")

    def version(self):
        self.wait(self.stand_in.version_delay)
        self.reply({"version": VERSION})

    def tags(self):
        models = [
            {"name": name, "model": name, "modified_at": now(), "size": size, "digest": digest(name)}
            | {"details": details(name)}
            for name, size in self.stand_in.models.items()
        ]
        self.reply({"models": models})

    def ps(self):
        self.reply({"models": list(self.stand_in.loaded.values())})

    def show(self, body):
        name = short(body.get("model") or body.get("name") or "")
        if name not in self.stand_in.models:
            return self.reply({"error": f"model '{name}' not found"}, 404)
        capabilities = ["completion", "tools", *(["thinking"] if name in THINKING else [])]
        info = {"general.architecture": details(name)["family"], "general.parameter_count": 1_000_000}
        self.reply(
            {"license": "", "modelfile": "", "parameters": "temperature 1", "template": "{{ .Prompt }}"}
            | {"details": details(name), "model_info": info, "capabilities": capabilities, "modified_at": now()}
        )

    def load(self, body):
        """Load a model as a request asks for; return its context, or None where an error was sent."""
        name, options = short(body.get("model", "")), body.get("options") or {}
        if name not in self.stand_in.models:
            return self.reply({"error": f"model '{name}' not found"}, 404)
        failures = {
            "memory": "model requires more system memory (13.1 GiB) than is available (3.2 GiB)",
            "killed": "llama runner process has terminated: signal: killed",
        }
        if self.stand_in.chat in failures:
            return self.reply({"error": failures[self.stand_in.chat]}, 500)
        if body.get("think") and name not in THINKING:
            return self.reply({"error": f'"{name}" does not support thinking'}, 400)
        context = options.get("num_ctx") or DEFAULT_CONTEXT
        seconds = {"m": 60, "s": 1}
        alive = re.fullmatch(r"(\d+)([ms])", str(body.get("keep_alive") or "5m"))
        expires = datetime.now(UTC) + timedelta(seconds=int(alive[1]) * seconds[alive[2]])
        size = self.stand_in.models[name]
        loaded = {"name": name, "model": name, "size": size, "digest": digest(name), "details": details(name)}
        served = 8 if self.stand_in.chat == "cut" else context
        loaded |= {"expires_at": expires.isoformat(), "size_vram": size // 2, "context_length": served}
        self.stand_in.loaded[name] = loaded
        return context

    def generate(self, body):
        if self.load(body) is not None:  # an empty prompt only loads the model
            assert not body.get("prompt"), "the stand-in generates by /api/chat only"
            self.reply(
                {"model": body["model"], "created_at": now(), "response": "", "done": True, "done_reason": "load"}
            )

    def pull(self, body):
        """Fetch a model: in ten steps, from where the last attempt stopped."""
        name, stand_in = short(body.get("model") or body.get("name") or ""), self.stand_in
        if not re.fullmatch(r"[\w.:/-]+", name):
            return self.reply({"error": "invalid model name"}, 400)
        self.begin()
        self.line({"status": "pulling manifest"})
        if stand_in.pull_breaks == "old":
            self.line({"error": TOO_OLD})
            return self.end()
        if name not in LIBRARY:
            self.line({"error": "pull model manifest: file does not exist"})
            return self.end()
        layers = {f"sha256:{digest(name)}": LIBRARY[name], f"sha256:{digest(name + 'config')}": 1_000}
        for layer, total in layers.items():
            status = {"status": f"pulling {layer[7:19]}", "digest": layer, "total": total}
            self.line(status)  # without `completed` until some of it is there
            while stand_in.fetched.get(layer, 0) < total:
                self.wait(stand_in.pull_delay)
                stand_in.fetched[layer] = min(stand_in.fetched.get(layer, 0) + total // 10 + 1, total)
                self.line(status | {"completed": stand_in.fetched[layer]})
                if stand_in.pull_breaks and stand_in.fetched[layer] > total // 2:
                    how, stand_in.pull_breaks = stand_in.pull_breaks, ""
                    if how == "die":
                        return self.hang_up()
                    if how in BREAKS:
                        self.line({"error": BREAKS[how]})
                    return self.end()
        for status in ("verifying sha256 digest", "writing manifest", "success"):
            self.line({"status": status})
        stand_in.models[name] = LIBRARY[name]
        self.end()

    def chat(self, body):
        mode, stand_in = self.stand_in.chat, self.stand_in
        assert mode in MODES, mode
        context = self.load(body)
        if context is None:
            return None
        if mode == "busy" or not stand_in.places.acquire(blocking=False):
            return self.reply({"error": "server busy, please try again.  maximum pending requests exceeded"}, 503)
        try:
            while not stand_in.runner.acquire(timeout=0.02):  # one question at a time: the others wait
                self.wait(0.001)
            try:
                return self.answer(mode, body, context)
            finally:
                stand_in.runner.release()
        finally:
            stand_in.places.release()

    def answer(self, mode, body, context):
        started, stand_in = time.monotonic_ns(), self.stand_in
        if mode == "fail":
            return self.reply({"error": "llama runner process has terminated: exit status 2"}, 500)
        if mode == "page":
            return self.send_bytes(b"<html><body>Sign in first, out of memory</body></html>", 200, "text/html")
        if mode == "silent":
            self.wait(3600)
        if mode == "slow":
            self.wait(stand_in.delay)
        head = {"model": body["model"], "created_at": now()}
        thinks = body["model"] in THINKING and body.get("think") is not False
        self.begin()
        for word in ("Let", " me", " see.") if thinks else ():
            self.line(head | {"message": {"role": "assistant", "content": "", "thinking": word}, "done": False})
        limit = (body.get("options") or {}).get("num_predict", 128)
        words = [] if mode in ("length", "empty") else re.findall(r"\s*\S+", stand_in.say(body))
        full, count = mode == "length" or len(words) > limit >= 0, 0
        for word in words[:limit] if full else words:
            self.line(head | {"message": {"role": "assistant", "content": word}, "done": False})
            count += 1
            if count == 2 and mode in WRONG_LINES:
                self.line(WRONG_LINES[mode])
                return self.end()
            if count == 2 and mode in ("die", "vanish"):
                self.wait(0.05)  # what was sent shall arrive before the reset
                if mode == "vanish":
                    self.wfile.write(b'40\r\n{"model": "gpt-oss:20b", "mess')
                return self.hang_up(reset=mode == "die")
        while mode == "endless":
            self.line(head | {"message": {"role": "assistant", "content": " more"}, "done": False})
            self.wait(0.03)
        if mode == "unfinished":
            return self.end()
        read = prompt_read(body.get("messages") or [], context)
        elapsed = time.monotonic_ns() - started
        last = head | {
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": "length" if full else "stop",
            "total_duration": elapsed,
            "load_duration": elapsed // 10,
            "prompt_eval_count": read // 2 if mode == "cut" else read,
            "prompt_eval_duration": elapsed // 3,
            "eval_count": limit if full else count + 3,
            "eval_duration": elapsed // 3,
        }
        if mode == "uncounted":
            del last["prompt_eval_count"]
        self.line(last)
        return self.end()


TOO_OLD = (
    "pull model manifest: 412: \n\nThe model you are attempting to pull requires a newer version of Ollama that may be "
    "in pre-release.\n\nPlease see https://github.com/ollama/ollama/releases for more details.\n\n"
)
BREAKS = {
    "error": "max retries exceeded: EOF",
    "full": "write sha256-0f-partial-0: no space left on device",
}
WRONG_LINES = {
    "error": {"error": "an error was encountered while running the model: unexpected EOF"},
    "malformed": '{"model": "gpt-oss:20b", "message": {"role": "assis',
    "list": '["not", "an", "object"]',
    "odd": {"answer": 42},
}


def prompt_read(messages, context):
    """Return how many tokens of a prompt are read: old messages drop out, one too long alone is cut to half."""
    kept = list(messages)
    while sum(map(tokens, kept)) > context:
        droppable = [message for message in kept[:-1] if message["role"] != "system"]
        if not droppable:
            return context // 2 + 2
        kept.remove(droppable[0])
    return sum(map(tokens, kept))


def details(name):
    return {"format": "gguf", "family": name.split(":")[0], "parameter_size": "1B", "quantization_level": "MXFP4"}


def now():
    return datetime.now(UTC).isoformat()


class Server(ThreadingHTTPServer):
    """Bound at once, as Ollama binds; `serve_forever` begins to answer."""

    daemon_threads = True
    owner: "StandIn"

    def handle_error(self, *_):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)


class StandIn:
    """The server and what it does; all attributes may be set while it runs."""

    def __init__(self, models=("gpt-oss:20b", "plain:1b"), host="127.0.0.1", port=0, waiting=16):
        self.models = {name: LIBRARY[name] for name in models}
        self.chat = "answer"
        self.delay = 1.0  # of 'slow'
        self.version_delay = 0.0
        self.pull_delay = 0.0
        self.pull_breaks = ""  # 'die', 'error', 'full' or 'end': once, in the middle of a layer; 'old': always, at once
        self.before = ""  # 'key' (a proxy), 'moved' or 'reset': what a GET meets; 'shut': what each connection meets
        self.fetched = {}  # bytes of each layer that are there
        self.loaded = {}
        self.requests = []
        self.gone = threading.Event()
        self.closing = False
        self.runner = threading.Lock()
        self.places = threading.BoundedSemaphore(waiting)
        self.http = Server((host, port), Handler)
        self.http.owner = self
        self.url = f"http://{host}:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)

    def say(self, body):
        """Return the answer to a request; a test may put another function in its place."""
        return f"You said: {body['messages'][-1]['content']}"

    def asked(self, path):
        """Return the bodies of the requests to a path."""
        return [body for where, body in self.requests if where == path]

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.closing = True
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class SomethingElse(BaseHTTPRequestHandler):
    """Another service on the port: a page for each path, whether or not it is there."""

    status = 200

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b"<!doctype html><title>Model railway, out of memory</title>"
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET


def write_program(folder):
    """Write an `ollama` into a folder, to be put on PATH; it runs `main` below. Return its path.

    The environment says how it goes wrong: STAND_IN_EXIT (a line that it writes before it ends with code 1),
    STAND_IN_DELAY (seconds of silence between listening and answering), STAND_IN_STUBBORN (SIGTERM doesn't end it),
    STAND_IN_RUNNER (a file to which the process ids of itself and of a child are written, a model's runner).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ollama"
    path.write_text(f"#!{sys.executable} -SE\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                    "from ollama_stand_in import main\nsys.exit(main(sys.argv[1:]))\n", encoding="utf-8")  # fmt: skip
    path.chmod(0o755)
    return path


def main(arguments):
    """`ollama serve`: listen on OLLAMA_HOST, then look for GPUs, then answer, until SIGTERM."""
    assert arguments == ["serve"], arguments
    host, _, port = os.environ.get("OLLAMA_HOST", "127.0.0.1:11434").rpartition(":")
    said = os.environ.get("STAND_IN_EXIT")
    if said:
        print(f"time=now level=INFO msg=starting\nError: {said}", file=sys.stderr)
        return 1
    try:
        stand_in = StandIn(host=host, port=int(port))
    except OSError:
        print(f"Error: listen tcp {host}:{port}: bind: address already in use", file=sys.stderr)
        return 1
    leave = threading.Event()
    stubborn = bool(os.environ.get("STAND_IN_STUBBORN"))
    signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else lambda *_: leave.set())
    print(f"Listening on {host}:{port} (version {VERSION})", file=sys.stderr, flush=True)
    record = os.environ.get("STAND_IN_RUNNER")
    if record:
        runner = subprocess.Popen([sys.executable, "-SEc", "import signal, time; signal.signal(15, signal.SIG_IGN); "
                                   "print(1, flush=True); time.sleep(600)"], stdout=subprocess.PIPE)  # fmt: skip
        runner.stdout.readline()  # from here on SIGTERM doesn't end it
        Path(record).write_text(f"{os.getpid()} {runner.pid}", encoding="utf-8")
    leave.wait(float(os.environ.get("STAND_IN_DELAY", "0")))
    with stand_in:
        leave.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
