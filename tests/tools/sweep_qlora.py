"""Train the embedded model once for each rank and choice of layers, and keep what came of it as rows.

python tests/tools/sweep_qlora.py [--out FILE]

Each point is one epoch of every third row of the course's training set at its own settings, `alpha` always twice the
rank. A run that was stopped goes on; rows of other weights, another training set or other settings are replaced.
Notebook 05 draws the rows.
"""

import argparse
import json
import shutil
import time
from dataclasses import replace
from datetime import date
from itertools import islice
from pathlib import Path

from helpers import settings
from helpers.dataset import to_prompt_completion
from helpers.finetuning import base_digest, load_base, load_finetuned, prepare, train
from helpers.house_style import follows
from helpers.language import detect_language
from helpers.llms import TransformersChat, answer_all
from helpers.planning import Recipe, held_out
from helpers.recording import describe_machine
from helpers.tiny_gpt_oss.measure import ONE, cases

ALL = ("q_proj", "k_proj", "v_proj", "o_proj")
# What tells most comes first: a sweep may be stopped.
POINTS = [(0, ALL), (2, ALL), (16, ALL), (64, ALL), (16, ("q_proj", "v_proj")), (16, ("o_proj",)), (8, ALL)]
EVERY, READ = 3, 16  # rows of the training set; questions with a passage, in each language


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=settings.RESULTS / "sweep_qlora.jsonl", help="file of the rows")
    out, started = parser.parse_args().out, time.perf_counter()
    dataset = settings.RUNS / "sweep_qlora.jsonl"
    dataset.parent.mkdir(parents=True, exist_ok=True)
    dataset.write_text("".join(settings.DATASET.read_text("utf-8").splitlines(True)[::EVERY]), encoding="utf-8")
    chosen, report, tokenizer = prepare("tiny", dataset, **changes(16, ALL))
    same = {
        "base_digest": base_digest(chosen.model), "dataset_sha256": report.sha256, "epochs": chosen.recipe.epochs,
        "learning_rate": chosen.recipe.learning_rate, "seed": chosen.recipe.seed, "read": READ,
    }  # fmt: skip
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out.exists() else []
    rows = [row for row in rows if same.items() <= row.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    for rank, targets in POINTS:
        if any((row["rank"], tuple(row["targets"])) == (rank, targets) for row in rows):
            continue
        made = {"rank": rank, "targets": targets} | measure(rank, targets, report, tokenizer, chosen.recipe)
        rows.append(same | made | {"machine": describe_machine(), "date": date.today().isoformat()})
        new = out.with_name(out.name + ".new")
        new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        new.replace(out)
        print(show(rows[-1]), flush=True)
    took = settings.format_seconds(time.perf_counter() - started)
    print(
        f"{len(rows)} points in {out} after {took}; {settings.format_seconds(sum(r['seconds'] for r in rows))} training"
    )


def changes(rank: int, targets: tuple[str, ...]) -> dict:
    return {"rank": rank, "alpha": 2 * rank, "targets": targets, "epochs": 1, "checkpoints": 1}


def measure(rank: int, targets: tuple[str, ...], report, tokenizer, recipe: Recipe) -> dict:
    """Train one point, 0 being the base as it is; return its size, its losses, its form and its reading."""
    if not rank:
        model, found = load_base("tiny"), {"numbers": 0, "losses": [], "seconds": 0.0, "peak_memory": 0}
    else:
        folder = settings.RUNS / "sweep_qlora"
        done = train("tiny", report.path, folder, say=lambda _: None, **changes(rank, targets))
        model = load_finetuned(folder)[0]
        numbers = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)
        found = {"numbers": numbers, "losses": done.losses, "seconds": done.seconds, "peak_memory": done.peak_memory}
        shutil.rmtree(folder)
    chat = TransformersChat(model=model, tokenizer=tokenizer, max_tokens=60)
    rows = to_prompt_completion(report, tokenizer)
    rows = rows.train_test_split(held_out(len(rows), recipe), seed=recipe.seed)["test"]
    said = answer_all(chat, rows["prompt"])
    found["follows"] = [
        follows(text, detect_language(row["prompt"][-1]["content"])) for row, text in zip(rows, said, strict=True)
    ]
    for language in ("en", "es"):
        asked = list(islice(cases("one", language, ("value",), ONE), READ))
        told = answer_all(chat, [case.messages for case in asked], batch=8)
        found[f"reads_{language}"] = [replace(case, text=text).right for case, text in zip(asked, told, strict=True)]
    return found


def show(row: dict) -> str:
    loss = f"{row['losses'][-1]['eval_loss']:.3f}" if row["losses"] else "    -"
    shares = "  ".join(f"{key} {sum(row[key])} of {len(row[key])}" for key in ("follows", "reads_en", "reads_es"))
    where = ",".join(name[0] for name in row["targets"])
    return f"rank {row['rank']:>2} on {where:<8} {row['numbers']:>9,} numbers  loss {loss}  {shares}"


if __name__ == "__main__":
    main()
