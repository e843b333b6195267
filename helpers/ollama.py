"""The Ollama server's life (find, start, ask, stop); each way it fails is one sentence. See docs.ollama.com/api."""

import atexit
import ipaddress
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import ollama

from helpers import settings

PROBE_SECONDS = 2.0
START_SECONDS = 60.0  # a server listens at once, and answers when it has looked for GPUs
STOP_SECONDS = 5.0
KEEP_ALIVE = "15m"  # how long a model stays in memory after a question
READ_SHARE = 0.55  # of a prompt's estimate, which errs upwards: who read less has cut it, to half of num_ctx
# Where the installers of Linux, macOS and Windows put the program, and the commands that install it.
PLACES = r"""/usr/local/bin/ollama /usr/bin/ollama /snap/bin/ollama ~/.local/bin/ollama /opt/homebrew/bin/ollama
    /Applications/Ollama.app/Contents/Resources/ollama %LOCALAPPDATA%\Programs\Ollama\ollama.exe""".split()
INSTALL = {"darwin": "brew install ollama", "win32": "winget install Ollama.Ollama"}
INSTALL_LINUX = "curl -fsSL https://ollama.com/install.sh | sh"


class OllamaError(RuntimeError):
    """Any failure with Ollama: one sentence, with the command that mends it."""


# fmt: off
class NotInstalled(OllamaError): ...
class NoServer(OllamaError): ...  # nothing answers, or the address is none
class PortTaken(OllamaError): ...  # what answers isn't Ollama
class ModelMissing(OllamaError): ...
class OutOfMemory(OllamaError): ...
class TooSlow(OllamaError): ...
class BrokenStream(OllamaError): ...  # the connection was lost, or a line is not of the protocol
class ServerFault(OllamaError): ...  # an error that the server reports
class PullFailed(OllamaError): ...
class PromptCut(OllamaError): ...
class NoText(OllamaError): ...


NO_PROGRAM = "Ollama is not installed: `{how}`, or see https://ollama.com/download."
TAKEN = "What answers at {url} is not Ollama: end it (`{who}` names it), or set OLLAMA_HOST=127.0.0.1:11435."
SILENT = "What listens at {url} is silent: wait if it is Ollama starting, else end it (`{who}` names it)."
NOBODY = "No Ollama answers at {url}: start it there with `ollama serve`, or set OLLAMA_HOST to where it runs."
ENDED = "`ollama serve` {how}, and the last line of {log} is '{said}': run it in a terminal to see more."
MISSING = "{url} has no {model}: fetch it with `ollama pull {model}` or pull=True{smaller}."
SLOW = "{model} said nothing in time: see with `ollama ps` where it runs, or raise settings.OLLAMA_SECONDS{smaller}."
LOST = "The answer of {model} broke off ({said}): ask again, and if it stays so, see the log ({log} if started here)."
STRANGE = "{url} sent what is not of Ollama's protocol ({said}): ask again, and if it stays so, update Ollama."
PULLS = (  # why a model was not fetched, as a pattern; what mends it
    (r"not exist|invalid model name", "Ollama's library has no {model}: look it up at https://ollama.com/library."),
    (r"newer version", "{model} needs a newer Ollama: update it from https://ollama.com/download."),
    (r"no space left|not enough space", "{said}: free space there, then `ollama pull {model}` goes on."),
    (r"", "{model} was not fetched ({said}): `ollama pull {model}` goes on where it stopped."),
)
REPLIES = (  # what a server replies, status first (-1 within a stream), as a pattern; what that is; what mends it
    (r"^\S+ \s*<|^(404(?!.*model)|405|501) ", PortTaken, TAKEN),  # a page of HTML, or no such path
    (r"model ['\"].* not found", ModelMissing, MISSING),
    (r"memory|alloc|resource limit|: killed", OutOfMemory,
     "{model} doesn't fit in memory ({said}): end other programs or lower settings.OLLAMA_CONTEXT{smaller}."),
    (r"context (length|size|window)", PromptCut,
     "{model} refused the prompt ({said}): raise settings.OLLAMA_CONTEXT or give it less."),
    (r"support thinking", ServerFault, "{said}: ask chat_model for reasoning=None."),
    (r"server busy", TooSlow, "Too many questions wait at {url}: ask again in a minute."),
    (r"", ServerFault, "{url} reports: {said}; ask again, and if it stays so, see its log ({log} if started here)."),
)
# fmt: on


@dataclass(frozen=True)
class Server:
    """What was found: the program's path (None: not installed), the models (None: no answer) and what is wrong."""

    binary: str | None
    models: tuple[str, ...] | None
    problem: str = ""


def look() -> Server:
    """Look for the program and ask the server on OLLAMA_HOST (by default on this machine) for its models."""
    try:
        server = Ollama()
        return Server(find_binary(), None if server.version() is None else server.models())
    except OllamaError as error:
        return Server(find_binary(), None, str(error))


def find_binary() -> str | None:
    """Return the path of `ollama`, from PATH or where its installers put it; None if it isn't there."""
    places = (os.path.expanduser(os.path.expandvars(place)) for place in PLACES)
    return shutil.which("ollama") or next((place for place in places if os.access(place, os.X_OK)), None)


def address(host: str | None = None) -> str:
    """Return the server's URL from `host`, else from OLLAMA_HOST, read as Ollama's own client reads it.

    'gpu', 'gpu:11434', ':11434', 'http://gpu' (port 80), '::1', '[::1]:11434'. 0.0.0.0 and :: are addresses to listen
    on: this machine is asked. Raises NoServer for what is no address.
    """
    named = (host or os.environ.get("OLLAMA_HOST", "")).strip("\"' \t\r\n")
    scheme, _, rest = ("https://ollama.com" if named == "ollama.com" else named).rpartition("://")
    default = {"": 11434, "http": 80, "https": 443}.get(scheme.lower(), 0)
    place, _, path = rest.partition("/")
    with suppress(ValueError):
        place = f"[{ipaddress.IPv6Address(place)}]"
    parts = re.fullmatch(r"(\[[\da-fA-F:.]+\]|[\w.-]*)(?::(\d{1,5}))?", place)
    with suppress(ValueError, TypeError):  # no port, no IPv6 address, a label empty or too long; `parts` is None
        name = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(parts[1], parts[1])
        url = f"{scheme.lower() or 'http'}://{name}:{parts[2] or default}/{path}".rstrip("/")
        if default and urlsplit(url).port and name.encode("idna"):
            return url
    raise NoServer(f"{'`host`' if host else 'OLLAMA_HOST'} is no address: set it to one such as 127.0.0.1:11434.")


class Ollama:
    """One server: at `host`, else at OLLAMA_HOST, else on this machine, where alone one may be started.

    What it starts ends with `stop` or with this process; a server that ran before is never touched.
    """

    def __init__(self, host: str | None = None) -> None:
        self.url = address(host)
        self._local = re.fullmatch(r"localhost|127(\.\d+){3}|::1", urlsplit(self.url).hostname or "") is not None
        self.process: subprocess.Popen | None = None  # the server, if this object started it
        self._starting = threading.Lock()  # of two threads the second finds the server of the first
        self._owner = os.getpid()  # a fork of this process must not stop it

    def version(self) -> str | None:
        """Return the server's version; None where nothing listens. Raises PortTaken, or TooSlow if it is silent."""
        try:
            key = os.environ.get("OLLAMA_API_KEY")  # as the client library sends it, for a proxy before the server
            how = {"headers": {"Authorization": f"Bearer {key}"} if key else {}, "follow_redirects": True}
            reply = httpx.get(f"{self.url}/api/version", **how, **self._transport(PROBE_SECONDS))
            return str(reply.raise_for_status().json()["version"])
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL):
            return None
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            silent = isinstance(error, (httpx.TimeoutException, httpx.NetworkError))
            if isinstance(error, httpx.RemoteProtocolError):  # httpx doesn't say whether there was a word
                at = urlsplit(self.url)
                with suppress(OSError), socket.create_connection((at.hostname, at.port), PROBE_SECONDS) as connection:
                    silent = connection.recv(1) == b""  # so Docker's proxy and `ssh -L` close while a server starts
            raise _error(*((TooSlow, SILENT) if silent else (PortTaken, TAKEN)), self.url) from error

    def start(self, seconds: float = START_SECONDS) -> bool:
        """Make sure that a server answers, within `seconds`; return whether it is one that this object started.

        Its log is in runs/, with the port in its name. Raises NotInstalled, PortTaken, TooSlow or NoServer.
        """
        with self._starting:
            if self.process and self.process.poll() is not None:  # it died since
                self.stop()
            end, ended = time.monotonic() + seconds, False
            try:
                while True:
                    try:
                        if self.version() is not None:
                            break
                        if self.process is None:
                            self._launch()
                    except TooSlow:  # it may be the one just started, or one that another has just started
                        if self.process is None and time.monotonic() > end:
                            raise
                    if ended or (self.process and time.monotonic() > end):
                        how = f"ended with code {self.process.returncode}" if ended else "did not answer in time"
                        log = _log(self.url).read_text(encoding="utf-8", errors="replace")
                        raise _error(NoServer, ENDED, self.url, said=log.strip().rpartition("\n")[2], how=how)
                    ended = self.process is not None and self.process.poll() is not None
                    time.sleep(0.05)
            except BaseException as error:
                self.stop()
                if isinstance(error, OSError):
                    raise NoServer(f"`ollama serve` could not be started ({error}): check that path.") from error
                raise
            if self.process and self.process.poll() is not None:  # what answers is another's: ours found the port taken
                self.stop()
            return self.process is not None

    def _launch(self) -> None:
        parts, binary = urlsplit(self.url), find_binary()
        if not self._local or parts.scheme != "http" or parts.path:
            raise _error(NoServer, NOBODY, self.url)
        if binary is None:
            raise _error(NotInstalled, NO_PROGRAM, self.url, how=INSTALL.get(sys.platform, INSTALL_LINUX))
        env = os.environ | {"OLLAMA_HOST": parts.netloc}  # 0.0.0.0 has become loopback
        # Apart from this terminal (on Windows: a new group without a window): Ctrl-C stops an answer, not the server.
        apart = {"creationflags": 0x08000200} if os.name == "nt" else {"start_new_session": True}
        settings.RUNS.mkdir(parents=True, exist_ok=True)
        with _log(self.url).open("wb") as log, open(os.devnull) as nothing:
            self.process = subprocess.Popen([binary, "serve"], env=env, stdin=nothing, stdout=log, stderr=log, **apart)
        atexit.register(self.stop)
        for end in (s for s in signal.Signals if s.name in ("SIGTERM", "SIGHUP", "SIGQUIT")):  # atexit shall run
            with suppress(ValueError):  # outside the main thread they stay as they are
                if signal.getsignal(end) is signal.SIG_DFL:
                    signal.signal(end, lambda number, _: sys.exit(128 + number))

    def stop(self) -> None:
        """End the server that this object started, with the model runners under it; do nothing if it started none."""
        process, self.process = self.process, None
        if process is None or self._owner != os.getpid():
            return
        atexit.unregister(self.stop)
        if os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
        elif process.returncode is None:  # else it was reaped, and its number may be another's by now
            try:
                with suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait(STOP_SECONDS)
            finally:  # for what the first left of the group, even if Ctrl-C ended the wait
                with suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(STOP_SECONDS)

    def models(self) -> tuple[str, ...]:
        """Return the names of the models that the server has, sorted."""
        return tuple(sorted(model.model for model in self._ask("list").models if model.model))

    def digest(self, name: str) -> str:
        """Return the sha256 of a model, with which answers are recorded. Raises ModelMissing."""
        return self.require(name)

    def require(self, name: str, pull: bool = False) -> str:
        """Return the sha256 of a model; one that is missing is fetched if `pull`. Raises ModelMissing or PullFailed."""
        found = [each.digest for each in self._ask("list").models if each.model and _short(each.model) == _short(name)]
        if not found and not pull:
            raise _error(ModelMissing, MISSING, self.url, name)
        if not found:
            self.pull(name)
        return found[0] if found else self.require(name)

    def pull(self, name: str, progress: bool = True) -> None:
        """Fetch a model, gigabytes of it, with a bar if `progress`. Ctrl-C stops it. Raises PullFailed."""
        from tqdm.auto import tqdm

        layers, status = {}, "nothing"
        try:
            steps = self._ask("pull", name, stream=True, seconds=settings.OLLAMA_SECONDS)
            with closing(steps), tqdm(desc=name, unit="B", unit_scale=True, disable=not progress) as bar:
                for step in steps:
                    status = step.status or status
                    if step.digest and step.total:  # of one layer: how large the next ones are comes later
                        layers[step.digest] = step.completed or 0, step.total
                        bar.n, bar.total = (sum(sizes) for sizes in zip(*layers.values(), strict=True))
                        bar.refresh()
            why = "" if status == "success" else f"it ended at '{status}'"
        except Exception as error:
            if isinstance(explained := explain(error, name, self.url), (NoServer, PortTaken)):
                raise explained from error
            why = str(getattr(error, "error", error)) or type(error).__name__
        if why:
            raise _error(PullFailed, next(mend for p, mend in PULLS if re.search(p, why)), self.url, name, why)

    def warm_up(self, name: str, num_ctx: int) -> None:
        """Load a model into memory. `num_ctx` must be that of the questions to come, or they load it once more."""
        options, seconds = {"num_ctx": num_ctx}, settings.OLLAMA_SECONDS
        self._ask("generate", name, options=options, keep_alive=KEEP_ALIVE, seconds=seconds)

    def capabilities(self, name: str) -> tuple[str, ...]:
        """Return what a model can do, such as 'completion' and 'thinking'. Raises ModelMissing."""
        return tuple(self._ask("show", name).capabilities or ())

    def chat_model(
        self, name: str, *, num_ctx: int, num_predict: int | None = None, temperature: float = 0.0, seed: int = 0,
        reasoning: str | bool | None = None, timeout: float | None = None,
    ):  # fmt: skip
        """Return the model as LangChain's ChatOllama. Raises ModelMissing.

        `num_ctx`: the server's default may be 4096, and it cuts what is longer without a word. `reasoning`: low, medium
        or high for gpt-oss, a bool for others that think; None: low or off. `timeout`: the longest silence, in seconds;
        None: settings.OLLAMA_SECONDS.
        """
        from langchain_ollama import ChatOllama

        if reasoning is None and "thinking" in self.capabilities(name):
            reasoning = "low" if "gpt-oss" in name else False
        options = {"num_ctx": num_ctx, "num_predict": num_predict, "temperature": temperature, "seed": seed}
        options |= {"keep_alive": KEEP_ALIVE, "client_kwargs": self._transport(timeout or settings.OLLAMA_SECONDS)}
        return ChatOllama(model=name, base_url=self.url, reasoning=reasoning, **options)

    def loaded(self) -> list:
        """Return the models in memory: `model`, `size` and `size_vram` in bytes, `context_length` in tokens."""
        return list(self._ask("ps").models)

    def served_context(self, name: str) -> int | None:
        """Return the context of a model in memory, in tokens; None where it isn't there or the server doesn't say."""
        try:
            loaded = self.loaded()
        except OllamaError:  # asked after an answer, which no failure here shall spoil
            return None
        return next((one.context_length for one in loaded if _short(one.model or "") == _short(name)), None)

    def _ask(self, method: str, *name: str, seconds: float = 10.0, **options):
        try:
            return getattr(ollama.Client(self.url, **self._transport(seconds)), method)(*name, **options)
        except Exception as error:
            raise explain(error, "".join(name), self.url) from error

    def _transport(self, seconds: float) -> dict:
        # Connecting takes no time where something listens. No proxy stands between us and this machine.
        return {"timeout": (min(seconds, 5.0), seconds, seconds, seconds), "trust_env": not self._local}


def check_final(
    metadata: dict, content: str, estimated_prompt_tokens: int, num_ctx: int, served: int | None = None
) -> None:
    """Raise BrokenStream, PromptCut or NoText if what came is no answer; `metadata` is its `response_metadata`.

    `served`: the context that the model has in the server, in tokens, where that is known: what fits it isn't cut.
    """
    read, asked = metadata.get("prompt_eval_count") or 0, estimated_prompt_tokens
    if not metadata.get("done"):
        raise BrokenStream("The answer ended without its last line: ask again.")
    # A cut leaves half of the context or all of it, by the server's version.
    full = served is not None and read >= served - 1
    if (served is None or served < asked) and (full or read < READ_SHARE * asked):
        less = "raise settings.OLLAMA_CONTEXT or give it fewer passages"
        mend = less if asked > READ_SHARE * num_ctx else "see CONTEXT in `ollama ps`, or update Ollama"
        raise PromptCut(f"Ollama read {read} of about {asked} tokens of the prompt (num_ctx is {num_ctx}): {mend}.")
    if not content.strip():
        if metadata.get("done_reason") == "length":
            raise NoText("The model ran out of tokens while thinking: raise settings.THINKING_TOKENS, or ask for less.")
        raise NoText("The model answered with nothing: ask again, or take another model.")


def explain(error: Exception, model: str = "", url: str | None = None) -> OllamaError:
    """Return what `ollama`, `httpx` or `langchain_ollama` raised as the one sentence that says what mends it."""
    kind, text, said = BrokenStream, STRANGE, getattr(error, "doc", "") or str(error) or type(error).__name__
    if isinstance(error, OllamaError):
        return error
    if isinstance(error, ollama.ResponseError) or said.lstrip().startswith("<"):
        said = str(getattr(error, "error", said))
        reply = f"{getattr(error, 'status_code', 200)} {said}"
        kind, text = next(meant[1:] for meant in REPLIES if re.search(meant[0], reply, re.IGNORECASE))
    elif isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)) or type(error) is ConnectionError:
        kind, text = NoServer, NOBODY
    elif isinstance(error, httpx.TimeoutException):
        kind, text = TooSlow, SLOW
    elif isinstance(error, (httpx.HTTPError, httpx.StreamError, OSError)):
        text = LOST
    return _error(kind, text, url or address(), model, said)


def _log(url: str) -> Path:
    return settings.RUNS / f"ollama_{urlsplit(url).port}.log"


def _short(name: str) -> str:
    """Return a model's name as servers list it: with its tag, and without the library where it is Ollama's own."""
    short = re.sub(r"^(registry\.ollama\.ai/)?(library/)?", "", name.lower())
    return short if ":" in short.rpartition("/")[2] else f"{short}:latest"


def _error(kind: type[OllamaError], text: str, url: str, model: str = "", said: str = "", how: str = "") -> OllamaError:
    who = f"netstat -ano | findstr :{urlsplit(url).port}" if os.name == "nt" else f"lsof -i :{urlsplit(url).port}"
    names = [name for name, *_ in settings.OLLAMA_MODELS]
    rest = settings.OLLAMA_MODELS[names.index(_short(model)) + 1 :] if _short(model) in names else ()
    listed = ", ".join(f"{name} ({size:g} GB)" for name, size, _ in rest)
    smaller = f", or take a smaller model: {listed}" if rest else ""
    model, said = model or "the model", " ".join(said.split())[:200]
    return kind(text.format(url=url, model=model, said=said, how=how, who=who, smaller=smaller, log=_log(url)))
