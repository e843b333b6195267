"""Paths, the course's constants, and what this machine has.

Every default of the course stands here once. Paths come from `ROOT`, never from the working directory,
because a notebook's kernel runs in `notebooks/`.
"""

import math
import os
import platform
from dataclasses import dataclass, field
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
# Of the passages `tiny` is given so many sentences, the likeliest. With 4 to 10 it refused 13 or 14 of the 18
# development questions without an answer, with whole passages 8, and answered as many of the others rightly.
TINY_SENTENCES = 6
ANSWER_TOKENS = 256  # room kept for an answer
THINKING_TOKENS = 1024  # and as much more where a model thinks first: that too is counted as its answer
OLLAMA_CONTEXT = 8192  # tokens; Ollama's own default is 4096 on small machines, and it cuts what is longer in silence
OLLAMA_SECONDS = 300.0  # without a word: reading a model from a slow disk and a long prompt on a CPU take minutes
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


# Fine-tuning (notebook 05).


@dataclass(frozen=True)
class Recipe:
    """The course's settings. `targets`: the layers that get an adapter, of `rank`; `batch`: rows a step.

    `evaluation`: the share of rows that is held out; `patience`: evaluations without progress after which training
    stops, 0 for never; `checkpoints`: how many a run writes and evaluates.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    four_bit: bool = True
    batch: int = 4
    learning_rate: float = 2e-4
    epochs: int = 3
    max_length: int = 1024
    evaluation: float = 0.1
    patience: int = 0
    checkpoints: int = 12
    seed: int = 1

    def __post_init__(self):
        for name in ("rank", "alpha", "batch", "learning_rate", "epochs", "max_length", "checkpoints"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to more than 0.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: set it to 0 or more.")
        if not (0 <= self.dropout < 1 and 0 <= self.evaluation < 1):
            raise ValueError("dropout and evaluation are shares: set them to at least 0 and less than 1.")
        if self.patience and not self.evaluation:
            raise ValueError("patience needs an evaluation: set evaluation to more than 0.")


@dataclass(frozen=True)
class Preset:
    """A base model of the course, how its recipe differs and why; `shape` is what its config.json on the hub says.

    `bfloat16`: it can't be trained in float16.
    """

    model: str
    licence: str
    download_gb: float
    changes: dict = field(default_factory=dict)
    why: str = ""
    shape: dict = field(default_factory=dict)
    bfloat16: bool = False


_GPT_OSS = {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32}
_QWEN3 = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
_TINY = (
    "fifteen times the learning rate: an adapter on so narrow matrices moves the output less a step, and steps are "
    "few; a third as many evaluations, which on a CPU take a good part of the time"
)
PRESETS = {  # the largest first
    # In float16 its losses go to infinity (Unsloth, "Long Context gpt-oss Training", 2025).
    "gpt-oss-20b": Preset("openai/gpt-oss-20b", "Apache-2.0", 13.8, shape=_GPT_OSS, bfloat16=True),
    "small": Preset("Qwen/Qwen3-0.6B", "Apache-2.0", 1.5, shape=_QWEN3),
    "tiny": Preset(str(TINY_GPT_OSS), "MIT", 0.0, {"learning_rate": 3e-3, "checkpoints": 4}, _TINY),
}


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
