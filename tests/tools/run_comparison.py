"""Make every recorded run that notebook 06 draws, in one call: python tests/tools/run_comparison.py

Cheap runs come first. What is there already is kept, and a run that was killed goes on at the same call. The adapters
go to runs/comparison/, the rows to notebooks/results/:

  forgetting_R.jsonl            reading of texts never seen, by a model tuned with rank R (0: not tuned)
  phrasings_N.jsonl             what is known by heart of facts said in N phrasings, as many epochs for each N
  phrasings_N_same_steps.jsonl  the same with more epochs for a smaller N, so that each fact is said as often
  edited.jsonl                  one question, after one fact of the training set was changed and all trained again
  comparison_tiny.jsonl         every question put to every arm

Each step has a process of its own, so that the memory it takes is its own too.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, replace
from datetime import date
from importlib import metadata
from pathlib import Path

from helpers import results, settings
from helpers.evaluation import Question, load_questions
from helpers.planning import recipe_of
from helpers.settings import format_seconds

SEEDS = (1, 2, 3)
PHRASINGS = (1, 2, 5, 10)
RANKS = (1, 4, 16, 64)
READING_PHRASINGS, READING_TOKENS = 1, 2048  # an example with passages is eighteen times as long as one without
EDIT = ("en-156", "8.5 kilometres", "11.2 kilometres")  # as in notebook 06


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=settings.RESULTS, help="folder of the rows (default %(default)s)")
    parser.add_argument("--adapters", type=Path, default=settings.RUNS / "comparison", help="folder of the adapters")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the trainings (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=100, help="a language, to measure reading (default %(default)s)")
    parser.add_argument("--few", type=int, help="to try it: so many questions a kind")
    parser.add_argument("--rows", type=int, help="to try it: so many rows of every training set")
    parser.add_argument("--epochs", type=int, help="to try it: so many for every training")
    options = parser.parse_args()
    made = Recordings(options, shlex.join(["python", "tests/tools/run_comparison.py", *sys.argv[1:]]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the process of a step goes too
    started = time.perf_counter()
    made.everything()
    print(f"All of it: {format_seconds(time.perf_counter() - started)}")


class Recordings:
    """What is to be made, and where it goes."""

    def __init__(self, options: argparse.Namespace, command: str):
        self.options, self.command = options, command
        self.out, self.adapters, self.seeds = options.out, options.adapters, options.seeds
        self.adapters.mkdir(parents=True, exist_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        self.every = load_questions(settings.QUESTIONS).questions
        lines = settings.DATASET.read_text(encoding="utf-8").splitlines()
        self.rows = [json.loads(line) for line in lines if line.strip()]

    def everything(self) -> None:
        first, plain = self.seeds[0], {seed: f"plain_{seed}" for seed in self.seeds}
        self.read(0, None)
        for n in PHRASINGS:
            self.know(n, {seed: self.phrased(n, seed) for seed in self.seeds})
        for seed, name in plain.items():
            self.train(name, self.rows, seed=seed)
        self.train("edited", self.edited(), seed=first)
        self.ask("edited.jsonl", {first: "edited"}, [self.edited_question()])
        for rank in RANKS:
            name = plain[first] if rank == 16 else f"rank_{rank}"
            self.train(name, self.rows, seed=first, **({} if rank == 16 else {"rank": rank, "alpha": 2 * rank}))
            self.read(rank, name)
        self.compare(plain, {})
        for n in PHRASINGS[:-1]:
            epochs = recipe_of("tiny", {}).epochs * PHRASINGS[-1] // n
            self.know(n, {first: self.phrased(n, first, f"_{epochs}_epochs", epochs=epochs)}, "_same_steps")
        self.step("examples with passages", write_examples, self.adapters / "reading.jsonl", self.options.rows)
        reading = {seed: f"reading_{seed}" for seed in self.seeds}
        for seed, name in reading.items():
            self.train(name, None, file="reading", seed=seed, max_length=READING_TOKENS, evaluation=0)
        self.compare(plain, reading)

    def phrased(self, n: int, seed: int, suffix: str = "", **changes) -> str:
        """Train on `n` phrasings of each fact; return the adapter's name.

        No row is held out: it might be the only one about its fact.
        """
        from helpers.comparison import with_phrasings

        name = f"phrasings_{n}{suffix}_{seed}"
        self.train(name, with_phrasings(self.rows, self.every, n), seed=seed, evaluation=0, **changes)
        return name

    def edited(self) -> list[dict]:
        """Return the training set with one fact changed."""
        _, old, new = EDIT
        rows = [{name: text.replace(old, new) for name, text in row.items()} for row in self.rows]
        if sum(one != other for one, other in zip(rows, self.rows, strict=True)) != 5:
            raise ValueError(f"{old!r} stands in other lines of {settings.DATASET.name} than the five about it.")
        return rows

    def edited_question(self) -> Question:
        name, old, new = EDIT
        question = next(question for question in self.every if question.id == name)
        return replace(question, answers=(new, new.split()[0]), outdated=(old, old.split()[0]), changed=True)

    def step(self, what: str, function, *arguments) -> None:
        """Run one step in a process of its own and print its time. Raises SystemExit where it failed."""
        started = time.perf_counter()
        process = multiprocessing.get_context("spawn").Process(target=function, args=arguments, daemon=True)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{what}: failed, see above. The same call goes on here.")
        print(f"{what}: {format_seconds(time.perf_counter() - started)}", flush=True)

    def train(self, name: str, rows: list[dict] | None, file: str = "", **changes) -> None:
        """Train an adapter `name` on rows, or on those in `file`, unless it is there already."""
        if self.options.epochs:
            changes["epochs"] = self.options.epochs
        path = self.adapters / f"{file or name}.jsonl"
        if rows is not None:
            write_rows(path, rows[: self.options.rows])
        if not as_planned(self.adapters / name, path, changes):
            self.step(f"training {name}", train_one, path, self.adapters / name, changes)

    def chosen(self, questions: list[Question]) -> list[Question]:
        return results.few(questions, self.options.few) if self.options.few else questions

    def know(self, n: int, adapters: dict[int, str], suffix: str = "") -> None:
        """Ask what was taught, without passages."""
        taught = [question for question in self.every if question.taught]
        self.ask(f"phrasings_{n}{suffix}.jsonl", adapters, self.chosen(taught))

    def ask(self, name: str, adapters: dict[int, str], questions: list[Question]) -> None:
        folders = {seed: self.adapters / adapter for seed, adapter in adapters.items()}
        self.step(f"asking {name}", ask_tuned, folders, questions, self.out / name, self.command)

    def read(self, rank: int, name: str | None) -> None:
        folder = self.adapters / name if name else settings.TINY_GPT_OSS
        arguments = (rank, folder, self.options.prompts, self.out / f"forgetting_{rank}.jsonl", self.command)
        self.step(f"reading, rank {rank}", read_held_out, *arguments)

    def compare(self, plain: dict[int, str], reading: dict[int, str]) -> None:
        asked = self.adapters / "questions.jsonl"
        chosen = {question.id for question in self.chosen(self.every)}
        lines = settings.QUESTIONS.read_text(encoding="utf-8").splitlines()
        asked.write_text("\n".join(line for line in lines if json.loads(line)["id"] in chosen), encoding="utf-8")
        tuned, reading = (
            {seed: f"hf:{self.adapters / name}" for seed, name in models.items()} for models in (plain, reading)
        )
        out = self.out / "comparison_tiny.jsonl"
        self.step("comparing the arms", compare_arms, asked, tuned, reading, out, self.command)


def as_planned(folder: Path, file: Path, changes: dict) -> bool:
    """Say whether the adapter in `folder` was trained on these rows, from this base and with this recipe."""
    from helpers.finetuning import base_digest
    from helpers.planning import model_of
    from helpers.storage import sha256_of

    if not (folder / "run.json").exists():
        return False
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    recipe = json.loads(json.dumps(asdict(recipe_of("tiny", changes))))
    same = run["dataset_sha256"] == sha256_of(file) and run["recipe"] == recipe
    return same and run["base_digest"] == base_digest(model_of("tiny"))


def train_one(file: Path, folder: Path, changes: dict) -> None:
    from helpers.finetuning import train

    done = train("tiny", file, folder, say=lambda text: None, **changes)
    last = [entry["loss"] for entry in done.losses if "loss" in entry][-20:]
    print(f"  {done.plan.steps} steps, loss {sum(last) / len(last):.3f} at the end, {format_seconds(done.seconds)}")


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_examples(file: Path, most: int | None) -> None:
    """Write the training set whose instructions hold passages."""
    from helpers.comparison import with_passages, with_phrasings
    from helpers.retrieval import Index, Retriever

    every, lines = load_questions(settings.QUESTIONS).questions, settings.DATASET.read_text(encoding="utf-8")
    chosen = with_phrasings([json.loads(line) for line in lines.splitlines()], every, READING_PHRASINGS)
    made = with_passages(chosen, every, Retriever(Index.open()[0]), READING_PHRASINGS)
    write_rows(file, made[:most])


def ask_tuned(folders: dict[int, Path], questions: list[Question], out: Path, command: str) -> None:
    from helpers.comparison import Arm, run

    ways = [Arm(results.TUNED, f"hf:{folder}", seed=seed) for seed, folder in folders.items()]
    found = run(ways, questions, out, command=command)
    right = [row["scores"]["right"] for row in found.rows]
    print(f"  right: {sum(right)} of {len(right)}")


def read_held_out(rank: int, folder: Path, prompts: int, out: Path, command: str) -> None:
    """Ask a model about passages of worlds that it never saw, and write a line for each answer."""
    from helpers.generation import is_refusal
    from helpers.llms import load_llm
    from helpers.recording import describe_machine
    from helpers.storage import sha256_of
    from helpers.tiny_gpt_oss.measure import THREE, answered, cases

    weights = {path.name: sha256_of(path)[:16] for path in sorted(folder.glob("*.safetensors"))}
    head = {"rank": rank, "model": folder.name, "weights": weights, "prompts": prompts, "command": command}
    if out.exists():
        noted = json.loads(out.read_text(encoding="utf-8").split("\n")[0])
        if all(noted.get(name) == head[name] for name in ("weights", "prompts")):
            return
    llm = load_llm("tiny" if rank == 0 else f"hf:{folder}")
    rows = []
    started = time.perf_counter()
    for language in ("en", "es"):
        found = answered(llm, cases("forgetting", language, ("value", "newer"), THREE), prompts)
        for number, case in enumerate(found):
            row = {"id": f"{language}-{number}", "language": language, "value": case.turn.value, "text": case.text}
            rows.append(row | {"right": case.right, "cited": case.cited, "refused": is_refusal(case.text)})
    head |= {"seconds": round(time.perf_counter() - started, 1), "machine": describe_machine()}
    head |= {"date": date.today().isoformat(), "versions": {p: metadata.version(p) for p in ("torch", "transformers")}}
    partial = out.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (head, *rows)), encoding="utf-8")
    os.replace(partial, out)
    print(f"  right: {sum(row['right'] for row in rows)} of {len(rows)}")


def compare_arms(questions: Path, tuned: dict, reading: dict, out: Path, command: str) -> None:
    from helpers.comparison import compare

    def progress(done: int, of: int) -> None:
        if done % 299 == 0 or done == of:
            print(f"  {done} of {of} answers", flush=True)

    found, _ = compare("tiny", settings.DOCUMENTS, questions, tuned, reading, out, None, progress, command)
    print(results.summary(found))


if __name__ == "__main__":
    main()
