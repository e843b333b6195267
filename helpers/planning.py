"""What a training takes, before anything is loaded: memory by part, disk and time, and whether this machine has them.

The arithmetic needs the shapes of a model and no weights: so another machine's card can be asked about too.
"""

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

from helpers import settings
from helpers.dataset import DatasetReport, check_dataset
from helpers.four_bit import audit, load_config, training_dtype
from helpers.settings import PRESETS, Preset, Recipe

GIB = 2**30
NF4_BYTES = 4.127 / 8  # of a weight, its share of the scales included (four_bit.NF4)
AUTO_SECONDS = 3600  # base="auto" takes no preset that would train longer here
CHECKPOINTS_KEPT = 2


class PlanRefused(ValueError):
    """A training that doesn't fit; the message has the numbers and the next smaller choice."""


@dataclass(frozen=True)
class Plan:
    """What a training takes: memory by part and what is free, in GiB; disk in GB; `seconds` roughly, 0 if not known.

    `tokens` is the longest row, `batch` the rows on the device at once, `accumulation` how many such make a step.
    `problem` says why it can't be run, '' if it can; `why` how base='auto' chose it.
    """

    base: str
    model: str
    recipe: Recipe
    device: str
    dtype: str
    optimizer: str
    batch: int
    accumulation: int
    checkpointing: bool
    tokens: int
    steps: int
    memory: dict[str, float]
    free_memory: float
    disk: float
    free_disk: float
    seconds: float
    problem: str = ""
    why: str = ""

    @property
    def total(self) -> float:
        """Return the memory of all parts, in GiB."""
        return sum(self.memory.values())

    def check(self) -> None:
        """Raise PlanRefused if this doesn't fit."""
        if self.problem:
            raise PlanRefused(f"{self.base} can't be trained here: {self.problem}.")

    def __str__(self) -> str:
        rows = [*self.memory.items(), (f"memory, of {self.free_memory:.2f} free", self.total)]
        lines = [
            f"{self.base} ({self.model.removeprefix(str(settings.ROOT) + os.sep)}) on {self.device}"
            + (f": {self.why}" if self.why else ""),
            f"  {self.steps} steps of {self.recipe.batch} rows, {self.batch} at once, of {self.tokens} tokens at most; "
            f"{self.dtype}, {self.optimizer}, learning rate {self.recipe.learning_rate:g}",
            *(f"  {part:<32}{_shown(size):>12}" for part, size in rows),
            f"  {f'disk, of {self.free_disk:.0f} free':<32}{f'{self.disk:.2f} GB':>12}",
            "  time: " + (f"about {settings.format_seconds(self.seconds)}" if self.seconds else "another machine's"),
        ]
        return "\n".join([*lines, f"  Refused: {self.problem}."] if self.problem else lines)


def _shown(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{1024 * gib:.1f} MiB"


def plan(
    base: str = "auto",
    dataset: DatasetReport | str | Path = settings.DATASET,
    *,
    device: str = "",
    dtype: str = "",
    free_memory: float | None = None,
    speed: tuple[float, float] | None = None,
    **changes,
) -> Plan:
    """Return what training `base` on `dataset` takes, without loading it: a preset, a hub name, a folder, or 'auto'.

    'auto' is the largest preset that fits, can be fetched and trains within an hour. `device`, `dtype`, `free_memory`
    (GiB) and `speed`, what its data sheet promises (operations and bytes a second), stand for another machine;
    `changes` are of the `Recipe`. Raises OSError for a base that can't be had, PlanRefused where no preset fits,
    ValueError for a setting that doesn't exist.
    """
    base, report = str(base), dataset if isinstance(dataset, DatasetReport) else check_dataset(dataset)
    device = device or settings.device()
    free_memory = _free_memory(device) if free_memory is None else free_memory
    here = (report, device, dtype or training_dtype(device), free_memory, speed)
    if base != "auto":
        found = _plan(base, *here, changes)
        return replace(found, problem=found.problem + _smaller(found, *here)) if found.problem else found
    passed_over = []
    for name, preset in PRESETS.items():
        found = _plan(name, *here, changes)
        reason = found.problem
        if not reason and found.seconds > AUTO_SECONDS:
            reason = f"about {found.seconds / 3600:.0f} hours on this {device}"
        if not reason:
            try:
                load_config(preset.model)
                return replace(found, why="; ".join(["the largest preset that fits", *passed_over]))
            except OSError:
                reason = "its files are not here and can't be fetched"
        passed_over.append(f"{name}: {reason}")
    raise PlanRefused("No preset can be trained here. " + "; ".join(passed_over) + ".")


def _smaller(refused: Plan, *here) -> str:
    """Return the next smaller choice as the end of a sentence."""
    for name in PRESETS:
        with suppress(OSError):  # one that isn't here is no choice
            other = _plan(name, *here, {})
            if not other.problem and other.total < refused.total:
                return f"; the next smaller choice is base={name!r}, which needs {other.total:.1f} GiB"
    return "; free some, or train on a machine with more"


def preset_of(base: str) -> Preset | None:
    """Return the preset that a base names, by its own name or its model's."""
    return PRESETS.get(base) or next((preset for preset in PRESETS.values() if preset.model == base), None)


def model_of(base: str) -> str:
    """Return the hub name or the absolute folder of a base, which may be a preset."""
    preset = preset_of(base)
    model = preset.model if preset else base
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def recipe_of(base: str, changes: dict) -> Recipe:
    """Return the course's settings with those of the preset `base`, if it is one, and `changes`. Raises ValueError."""
    known = [setting.name for setting in fields(Recipe)]
    if unknown := [name for name in changes if name not in known]:
        raise ValueError(f"There is no setting {', '.join(unknown)}: choose among {', '.join(known)}.")
    preset = preset_of(base)
    return Recipe(**(preset.changes if preset else {}) | changes)


def _plan(
    base: str, report: DatasetReport, device: str, dtype: str, free_memory: float, speed: tuple | None, changes: dict
) -> Plan:
    from transformers import AutoConfig

    preset, recipe = preset_of(base), recipe_of(base, changes)
    model = model_of(base)
    config = AutoConfig.for_model(**preset.shape) if preset and preset.shape else load_config(model)
    shape = _Shape.of(config, recipe, 4 if dtype == "float32" else 2)
    # Where no tokenizer is at hand: a token to 3 characters, which is safe, and the template.
    lengths = [whole for whole, _ in report.lengths] or [sum(map(len, row.values())) // 3 + 24 for row in report.rows]
    longest = min(max(lengths, default=1), recipe.max_length)
    for batch in (size for size in range(recipe.batch, 0, -1) if recipe.batch % size == 0):
        memory = shape.memory(device, batch, longest)
        total = sum(memory.values())
        if total <= free_memory:
            break
    rows = len(report.rows) - held_out(len(report.rows), recipe)
    steps = recipe.epochs * math.ceil(rows / recipe.batch)
    fetched = _to_fetch(model, preset.download_gb if preset else 2 * shape.weights / 1e9)
    # A checkpoint is adapter, optimizer and tokenizer; one more is being written, and the adapter itself is kept.
    disk = fetched + (CHECKPOINTS_KEPT + 2) * (12 * shape.adapters / 1e9 + 0.03)
    free_disk = shutil.disk_usage(settings.ROOT).free / 1e9
    if fetched and (cache := _hub_cache()).stat().st_dev != settings.ROOT.stat().st_dev:  # two disks: the tighter one
        here, there = (disk - fetched, free_disk), (fetched, shutil.disk_usage(cache).free / 1e9)
        disk, free_disk = max(here, there, key=lambda needed_and_free: needed_and_free[0] - needed_and_free[1])
    problem = ""
    if recipe.four_bit and shape.experts and config.model_type != "gpt_oss":
        problem = f"bitsandbytes leaves the experts of a {config.model_type} in 16 bits: four_bit=False plans for that"
    elif total > free_memory:
        parts = ", ".join(f"{part} {size:.1f}" for part, size in memory.items() if size >= 0.05)
        problem = f"it needs {total:.1f} GiB of memory even row by row ({parts}), and {free_memory:.1f} are free"
    elif disk > free_disk:
        problem = f"it needs {disk:.1f} GB of disk ({fetched:.1f} to fetch), and {free_disk:.1f} are free"
    elif preset and preset.bfloat16 and dtype == "float16":
        problem = "its numbers leave the range of float16, and this GPU has no bfloat16"
    evaluations = recipe.checkpoints * held_out(len(report.rows), recipe) / recipe.batch / 3  # without the way back
    speed = speed or (_speed(device, dtype) if device == settings.device() else None)
    a_step = shape.step_seconds(speed, recipe.batch * sum(lengths) / max(1, len(lengths))) if speed else 0.0
    seconds = (steps + evaluations) * a_step
    optimizer = "paged_adamw_32bit" if device == "cuda" else "adamw_torch"  # the first pages out on CUDA only
    return Plan(
        base, model, recipe, device, dtype, optimizer, batch, recipe.batch // batch, shape.checkpointing, longest,
        steps, memory, free_memory, disk, free_disk, seconds, problem,
    )  # fmt: skip


def held_out(rows: int, recipe: Recipe) -> int:
    """Return how many of so many rows are for evaluation."""
    return round(rows * recipe.evaluation)


@dataclass(frozen=True)
class _Shape:
    """The numbers of a model that memory and time follow from; counts are of weights, `width` is bytes of a number.

    `adapters`: in the adapters; `unpacked`: what is in 16 bits at once of what is stored in 4; `active`: what a token
    passes through; `eager`: whether attention writes down every score.
    """

    config: object
    four_bit: bool
    width: int
    weights: int
    matrices: int
    adapters: int
    unpacked: int
    active: int
    experts: int
    eager: bool

    @classmethod
    def of(cls, config, recipe: Recipe, width: int) -> "_Shape":
        """Count the weights of an architecture. Raises ValueError where the recipe's targets aren't in it."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):  # shapes without numbers
            model = AutoModelForCausalLM.from_config(config)
        adapted = [layer for name, layer in model.named_modules() if name.rpartition(".")[2] in recipe.targets]
        if not adapted:
            raise ValueError(f"targets is {recipe.targets}: a {config.model_type} has no layer of such a name.")
        experts = [sum(w.numel() for w in layer.parameters(recurse=False) if w.ndim == 3) for layer in model.modules()]
        matrices = audit(model).matrices
        used = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_local_experts", 1)
        return cls(
            config, recipe.four_bit, width,
            weights=sum(weight.numel() for weight in model.parameters()),
            matrices=matrices,
            adapters=sum(recipe.rank * (layer.in_features + layer.out_features) for layer in adapted),
            unpacked=max(experts) or max(layer.weight.numel() for layer in adapted),
            active=matrices + model.get_output_embeddings().weight.numel() - round((1 - used) * sum(experts)),
            experts=sum(experts),
            eager=model.config._attn_implementation == "eager",
        )  # fmt: skip

    @property
    def checkpointing(self) -> bool:
        """Say whether activations are computed twice instead of kept: small models have room and gain time."""
        return self.matrices > 50e6

    def memory(self, device: str, batch: int, tokens: int) -> dict[str, float]:
        """Return the memory of each part in GiB, for `batch` rows of `tokens` at once."""
        config, n, layers = self.config, batch * tokens, self.config.num_hidden_layers
        hidden, heads = config.hidden_size, config.num_attention_heads
        head = getattr(config, "head_dim", None) or hidden // heads
        scores = self.eager * batch * heads * tokens**2
        wide = getattr(config, "num_experts_per_tok", 1) * (8 * hidden + 4 * config.intermediate_size)
        # Numbers held at the worst moment of a layer, in its experts or in its attention, which don't fall together.
        # Fitted to what is alive in a step of gpt-oss-20b and of Qwen3-0.6B, followed with shapes alone.
        narrow = n * (14 * hidden + 8 * heads * head)
        in_experts, in_attention = narrow + n * wide + 1.25 * scores, narrow + 3 * scores
        if self.checkpointing:
            unpacked = self.four_bit * self.unpacked
            kept = layers * n * hidden + max(in_experts, in_attention - unpacked)
        else:  # autograd keeps most of every layer, and its experts unpacked
            unpacked = self.four_bit * (self.experts or self.unpacked)
            kept = 0.7 * layers * max(in_experts, in_attention)
        chunk = min(n, 4096)  # the trainer computes logits for so many tokens, and 32,768 words, at a time
        logits = chunk * 32768 * self.width + (0 if device == "cuda" else 28 * chunk * min(config.vocab_size, 32768))
        stored = "NF4" if self.four_bit else "16 bits" if self.width == 2 else "32 bits"
        parts = {
            f"matrices in {stored}": self.matrices * (NF4_BYTES if self.four_bit else self.width),
            "embeddings, head, norms": (self.weights - self.matrices) * self.width,
            "adapters and their gradients": 8 * self.adapters,
            "optimizer": 8 * self.adapters,
            "matrices unpacked at once": unpacked * self.width,
            "activations": kept * self.width,
            "logits": logits,
        }
        # CUDA's context, or the imported libraries; and gaps between what was freed and what is asked for next. With
        # torch 2.13 on Linux the imports took 0.54 GiB, and a run of `tiny` 0.15 GiB more than was planned with 0.5.
        own, size = ("CUDA's own", 0.5) if device == "cuda" else ("libraries", 0.65)
        parts[own] = size * GIB + 0.04 * sum(parts.values())
        return {part: size / GIB for part, size in parts.items() if size}

    def step_seconds(self, speed: tuple[float, float], tokens: float) -> float:
        """Return about how long a step on so many tokens takes, at a third of the speed that the device has."""
        passes = 3 if self.checkpointing else 2  # forward, once more, and back to the adapters
        operations, copied = speed
        unpacking = 3 * self.matrices / copied if self.four_bit else 0  # read half a byte and write two
        return passes * (
            2 * self.active * tokens / (operations / 3) + unpacking + 0.003 * self.config.num_hidden_layers
        )


@lru_cache
def _speed(device: str, dtype: str) -> tuple[float, float]:
    """Return what this machine's device does in a second: operations of a matrix product in `dtype`, bytes copied."""
    import torch

    size = 4096 if device == "cuda" else 512
    matrix = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)

    def fastest(work) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            work().sum().item()  # waits for the device
            times.append(time.perf_counter() - started)
        return min(times)

    return 2 * size**3 / fastest(lambda: matrix @ matrix), 2 * matrix.nbytes / fastest(matrix.clone)


def _free_memory(device: str) -> float:
    """Return what a model can have here, in GiB."""
    import psutil
    import torch

    if device == "cuda" and torch.cuda.is_available():
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return (torch.cuda.mem_get_info()[0] + unused) / GIB
    return psutil.virtual_memory().available / GIB


def _to_fetch(model: str, size: float) -> float:
    """Return the gigabytes of a model that aren't on this disk yet."""
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> str | None:
        path = try_to_load_from_cache(model, name)
        return path if isinstance(path, str) else None

    if Path(model).is_dir() or cached("model.safetensors"):
        return 0.0
    index = cached("model.safetensors.index.json")
    shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()) if index else {""}
    return size * sum(not cached(shard) for shard in shards) / len(shards)


def _hub_cache() -> Path:
    """Return the folder that downloads go to or, until there is one, the folder above."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    return next(folder for folder in (cache, *cache.parents) if folder.exists())


@contextmanager
def peak_memory(device: str, at_least: int = 0) -> Iterator[list[int]]:
    """Give a list whose one number is the most memory, in bytes, in use since: of the GPU, or else of this process."""
    import psutil
    import torch

    gpu = torch.cuda if device == "cuda" else None
    process, over = psutil.Process(), threading.Event()
    peak = [gpu.memory_allocated() if gpu else process.memory_info().rss]
    if gpu:
        gpu.reset_peak_memory_stats()

    def look() -> None:
        peak[0] = max(peak[0], at_least, gpu.max_memory_allocated() if gpu else process.memory_info().rss)

    def watch() -> None:
        while not over.wait(0.02):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()
        look()
