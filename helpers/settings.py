"""Paths, the course's constants, and what this machine has.

Every default of the course stands here once. Paths come from `ROOT`, never from the working directory,
because a notebook's kernel runs in `notebooks/`.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ROOT / "mis_documentos"
QUESTIONS = ROOT / "notebooks" / "questions.jsonl"
RESULTS = ROOT / "notebooks" / "results"  # recorded runs, as raw rows
DATASET = ROOT / "dataset.jsonl"  # the training set
FINE_TUNED = ROOT / "gpt_oss_fine_tuned"  # where an adapter goes; git-ignored
RUNS = ROOT / "runs"  # everything a run writes; git-ignored
INDEXES = RUNS / "index"
LOCK = ROOT / "requirements.lock"

# Chunking (notebook 01), in characters.
CHUNK_SIZE = 1000
CHUNK_OVERLAP = 200

# Embeddings (notebook 02). The encoder reads at most 256 tokens, and finds one sentence among many the better the
# less there is around it: windows of 64 tokens beat windows of 254 in both languages (notebook 03 shows by how much).
EMBEDDING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
WINDOW_TOKENS = 64
WINDOW_OVERLAP = 16  # tokens that two windows of one chunk share

# Retrieval (notebook 03).
TOP_K = 3
MODES = ("hybrid", "dense", "bm25")
BM25_K1 = 0.9  # how soon a repeated word stops counting; short passages want less than the usual 1.5
BM25_B = 0.4  # how much a long passage is marked down; chunks are of nearly one length
# The share of the vectors in the fused score, by the language of the question; the rest is BM25's. The encoder learnt
# from English. Chosen on the development questions and on half of XQuAD.
DENSE_WEIGHT = {"en": 0.7, "es": 0.4}

# Generation (notebook 04).
# Below this confidence `quotes` refuses. Chosen on the development questions: of those with an answer, one in ten is
# refused.
QUOTES_THRESHOLD = 0.92
TINY_GPT_OSS = ROOT / "helpers" / "tiny_gpt_oss"  # the embedded model, see its README.md
ANSWER_TOKENS = 256  # room kept for an answer
OLLAMA_CONTEXT = 8192  # tokens; Ollama's own default is 4096 on small machines, and it cuts what is longer in silence
OLLAMA_MODEL = "gpt-oss:20b"
# Models for smaller machines, the best first: name, download in GB, memory in GiB to run it with room for a prompt.
# Sizes as Ollama's library lists them.
OLLAMA_MODELS = (
    (OLLAMA_MODEL, 14.0, 16.0),
    ("qwen3:8b", 5.2, 8.0),
    ("qwen3:4b", 2.5, 5.0),
    ("qwen3:1.7b", 1.4, 3.0),
    ("qwen3:0.6b", 0.5, 2.0),
)


def device() -> str:
    """Return where tensors should live: 'cuda', 'mps' or 'cpu'. CUDA_VISIBLE_DEVICES="" hides the GPUs."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    # A hidden GPU must stay hidden on a Mac too, where CUDA_VISIBLE_DEVICES means nothing to torch.
    if torch.backends.mps.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return "mps"
    return "cpu"


def encoder_dtype(device_name: str) -> str:
    """Return the dtype to encode in: 'float32' or 'bfloat16'.

    bfloat16 needs hardware that multiplies it: AVX512-BF16 or AMX on a CPU, compute capability 8.0 on a
    GPU. Elsewhere it is slower than float32. The environment variable HELPERS_DTYPE overrides; tests and
    committed runs set it to float32, so that their numbers are the same on every machine.
    """
    import torch

    asked = os.environ.get("HELPERS_DTYPE", "")
    if asked:
        if asked not in ("float32", "bfloat16"):
            raise ValueError(f"HELPERS_DTYPE is {asked!r}: set it to float32 or bfloat16, or unset it.")
        return asked
    if device_name == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device_name == "cpu" and torch.backends.mkldnn.is_available():
        flags = cpu_flags()
        return "bfloat16" if {"avx512_bf16", "amx_bf16"} & flags else "float32"
    return "float32"


def half_dtype(device_name: str) -> str:
    """Return the 16-bit dtype of a GPU: 'bfloat16' where the hardware multiplies it, else 'float16'."""
    return "bfloat16" if encoder_dtype(device_name) == "bfloat16" else "float16"


def cpu_flags() -> set[str]:
    """Return the CPU's feature flags as Linux lists them; an empty set on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


@dataclass(frozen=True)
class Machine:
    """What this machine has. Sizes in GiB; `gpu` is None without one; `gpu_dtypes` as torch names them."""

    system: str
    python: str
    cores: int
    memory_gib: float
    free_memory_gib: float
    free_disk_gib: float
    gpu: str | None
    gpu_memory_gib: float
    gpu_dtypes: tuple[str, ...]


def machine() -> Machine:
    """Look at this machine: system, Python, cores, memory, disk and GPU."""
    import shutil

    import psutil
    import torch

    memory = psutil.virtual_memory()
    gpu, gpu_memory, dtypes = None, 0.0, ()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu, gpu_memory = properties.name, properties.total_memory / 2**30
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtypes = ("float32", "float16", "bfloat16") if bf16 else ("float32", "float16")
    elif device() == "mps":
        gpu, gpu_memory, dtypes = "Apple GPU", memory.total / 2**30, ("float32", "float16")
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_gib=memory.total / 2**30,
        free_memory_gib=memory.available / 2**30,
        free_disk_gib=shutil.disk_usage(ROOT).free / 2**30,
        gpu=gpu,
        gpu_memory_gib=gpu_memory,
        gpu_dtypes=dtypes,
    )


def format_seconds(seconds: float) -> str:
    """Return a duration as the course prints it, such as '0.42 s' or '3 min 20 s'.

    Every printed time goes through here, so that the notebooks' tests can mask times with one pattern.
    """
    if seconds < 0.01:
        return f"{seconds * 1000:.2f} ms"
    if seconds < 100:
        return f"{seconds:.2f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
