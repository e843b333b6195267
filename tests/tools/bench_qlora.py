"""Train ten steps of QLoRA on a model of gpt-oss-20b's shape, and print the memory and the speed.

python tests/tools/bench_qlora.py

It writes a checkpoint of random weights in the hub's format (MXFP4, in shards) layer by layer, loads it as the course
does, every matrix in NF4, and trains at 4 × 512 and at 1 × 1,024 tokens. A GPU gets the full shape: 13 GB of disk, and
minutes. Without one it is a twentieth of the width on the CPU, and what the full shape takes is computed.
"""

import argparse
import json
import multiprocessing
import shutil
import time
import warnings
from logging import getLogger
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers import settings
from helpers.dataset import DatasetReport
from helpers.finetuning import load_tokenizer, make_trainer
from helpers.four_bit import audit, read_base, training_dtype
from helpers.planning import PRESETS, peak_memory, plan
from helpers.recording import describe_machine

STEPS, WARM = 10, 2  # the first steps find memory and kernels: they don't count for the speed
BATCHES = ((4, 512), (1, 1024))
FULL = PRESETS["gpt-oss-20b"].shape
# A twentieth of 2,880 is 144; blocks of MXFP4 want a multiple of 32. Heads, groups and words in proportion; as many
# layers and experts.
NARROW = FULL | {
    "hidden_size": 160, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 1,
    "vocab_size": 10_048,
}  # fmt: skip
GOALS = {(4, 512): 22, (1, 1024): 16}  # GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=settings.RUNS / "bench_qlora", help="where the checkpoint goes")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there for the next time")
    options = parser.parse_args()
    device = settings.device()
    shape = FULL if device == "cuda" else NARROW
    folder = options.folder / f"{shape.get('hidden_size', 2880)}"
    print(describe_machine(), flush=True)
    try:
        if not (folder / "config.json").exists():
            started = time.perf_counter()
            write(folder, shape)
            took = settings.format_seconds(time.perf_counter() - started)
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"Checkpoint of random weights written in {took}: {size / 1e9:.2f} GB", flush=True)
        for batch, tokens in BATCHES:  # each in a process of its own, whose memory is its own too
            process = multiprocessing.get_context("spawn").Process(
                target=measure, args=(str(folder), device, batch, tokens)
            )
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"The run at {batch} × {tokens} tokens ended with {process.exitcode}, see above.")
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)
    print("\nThe full shape on a GPU, computed" + (":" if device == "cuda" else ", not yet measured:"))
    for batch, tokens in BATCHES:
        made = plan("gpt-oss-20b", rows_of(batch, tokens), device="cuda", free_memory=80, **recipe(batch, tokens))
        counted = made.total - made.memory["CUDA's own"]
        print(f"\n{batch} × {tokens} tokens (goal: at most {GOALS[batch, tokens]} GB)")
        for part, size in made.memory.items():
            print(f"  {part:<32}{size * 2**30 / 1e9:>7.2f} GB")
        print(f"  {'all but CUDA’s own':<32}{counted * 2**30 / 1e9:>7.2f} GB: what torch counts at the peak")


def write(folder: Path, shape: dict) -> None:
    """Write a checkpoint of random weights with the hub's names, a shard a layer; only one layer is in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape)
    with torch.device("meta"):
        sizes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in sizes:
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    folder.mkdir(parents=True, exist_ok=True)
    random, index = torch.Generator().manual_seed(1), {}
    for number, names in enumerate(shards.values()):
        file, tensors = f"model-{number:05d}-of-{len(shards) - 1:05d}.safetensors", {}
        for name in names:
            if len(sizes[name]) == 3 and not name.endswith("bias"):
                experts, inner, outer = sizes[name]
                rows = (experts, outer, inner // 32)
                tensors[f"{name}_blocks"] = torch.randint(0, 256, (*rows, 16), dtype=torch.uint8, generator=random)
                # 2^-7 and 2^-6 with 127 added: weights of about 0.03.
                tensors[f"{name}_scales"] = torch.randint(120, 122, rows, dtype=torch.uint8, generator=random)
            else:
                tensors[name] = torch.empty(sizes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=random)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    described = config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(described))


def recipe(batch: int, tokens: int) -> dict:
    return {"batch": batch, "max_length": tokens, "epochs": 1, "evaluation": 0, "checkpoints": 1}


def rows_of(batch: int, tokens: int) -> DatasetReport:
    """Return a training set of which only the lengths are known."""
    rows = [{"instruction": "", "output": ""}] * (batch * STEPS)
    return DatasetReport(Path(), "", rows, [], [(tokens, tokens)] * len(rows))


def measure(base: str, device: str, batch: int, tokens: int) -> None:
    """Load the model, train ten steps and print what they took."""
    from datasets import Dataset, disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    getLogger("bitsandbytes").setLevel("ERROR")  # as in four_bit
    import trl.trainer.sft_trainer  # noqa: F401  what is measured is the model, not the libraries

    made = plan(base, rows_of(batch, tokens), device=device, **recipe(batch, tokens))
    made.check()
    print(f"\n{batch} × {tokens} tokens, {training_dtype(device)}")
    with peak_memory(device) as peak:
        before, started = peak[0], time.perf_counter()
        model = read_base(base)
        loaded = settings.format_seconds(time.perf_counter() - started)
    print(f"  loaded in {loaded} with at most {(peak[0] - before) / 1e9:.2f} GB: {audit(model)}")
    ids = torch.randint(10, 4000, (batch * STEPS, tokens), generator=torch.Generator().manual_seed(2)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    ticks = []
    with peak_memory(device) as peak:
        trainer = make_trainer(
            model, load_tokenizer(settings.TINY_GPT_OSS), rows, made, Path(base).parent / "checkpoints",
            watch=lambda losses, *_: ticks.extend([time.perf_counter()] * (len(losses) - len(ticks))),
        )  # fmt: skip
        trainer.train()
    speed = batch * tokens * (len(ticks) - 1 - WARM) / (ticks[-1] - ticks[WARM])
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, gradients = ([entry[name] for entry in steps] for name in ("loss", "grad_norm"))
    print(f"  {len(steps)} steps, {speed:,.0f} tokens a second; loss {losses[0]:.3f} to {losses[-1]:.3f}, ", end="")
    print(f"gradients of norm {min(gradients):.2g} to {max(gradients):.2g}")
    print(
        f"  memory at its peak {(peak[0] - before) / 1e9:.2f} GB, planned {made.total * 2**30 / 1e9:.2f} GB", flush=True
    )


if __name__ == "__main__":
    main()
