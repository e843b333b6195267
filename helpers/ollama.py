"""The Ollama server: is it installed, does it answer, which models does it have."""

import shutil
from dataclasses import dataclass

PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class Server:
    """What was found: the path of the program (None: not installed) and the models (None: no answer)."""

    binary: str | None
    models: tuple[str, ...] | None


def look() -> Server:
    """Look for the program and ask the server on OLLAMA_HOST (by default on this machine) for its models."""
    import ollama

    try:
        listed = ollama.Client(timeout=PROBE_SECONDS).list()
    except Exception:  # the client passes on whatever the connection raised: here all of it means no answer
        return Server(shutil.which("ollama"), None)
    return Server(shutil.which("ollama"), tuple(sorted(model.model for model in listed.models if model.model)))
