"""Make every recorded run that notebook 06 draws, in one call: python tests/tools/run_comparison.py

What is there already is kept, and a run that was killed goes on at the same call. The adapters go to runs/comparison/,
the rows to notebooks/results/, by the parts of --parts:

  comparison  comparison_tiny.jsonl         every question put to every arm
  edit        edited.jsonl                  one question, after one fact was changed and all was trained again
  forgetting  forgetting_R.jsonl            reading of texts never seen, by a model tuned with rank R (0: not tuned)
  phrasings   phrasings_N.jsonl             what is known by heart of facts said in N phrasings, as many epochs each
              phrasings_N_same_steps.jsonl  the same with more epochs for a smaller N: each fact is said as often

Two calls with different parts may run side by side. Each step has a process of its own, so that the memory it takes is
its own too. Five phrasings are dataset.jsonl itself: what its adapters know stands in comparison_tiny.jsonl.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from importlib import metadata
from pathlib import Path

from helpers import results, settings
from helpers.evaluation import Question, load_questions
from helpers.planning import recipe_of
from helpers.settings import format_seconds

SEEDS = (1, 2, 3)
PARTS = ("comparison", "edit", "forgetting", "phrasings")
PHRASINGS = (1, 2, 10)
SAME_STEPS = (1,)  # phrasings, with as many steps as PER_FACT phrasings have
PER_FACT = 5  # phrasings of a fact in dataset.jsonl
RANKS = (16, 64, 1)
# With passages of 1000 characters an example is eighteen times as long as one without, and a CPU trains for hours: so
# shorter passages and fewer phrasings.
READING = {"epochs": 3, "evaluation": 0}
READING_PHRASINGS = 1
READING_CHUNK, READING_OVERLAP = 300, 60  # characters
ANSWER_TOKENS = 96  # of every arm: twice as many as the longest answer of dataset.jsonl has
EDIT = ("en-021", "18,700 nebrales", "21,400 nebrales")  # as in notebook 06


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=settings.RESULTS, help="folder of the rows (default %(default)s)")
    parser.add_argument("--adapters", type=Path, default=settings.RUNS / "comparison", help="folder of the adapters")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to make (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the trainings (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=50, help="a language, to measure reading (default %(default)s)")
    parser.add_argument("--few", type=int, help="so many questions a kind, instead of all")
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
        for part in self.options.parts:
            getattr(self, part)()

    def comparison(self) -> None:
        """Compare after each seed: a run that is stopped leaves a comparison already."""
        self.step("examples with passages", write_examples, self.adapters / "reading.jsonl", self.options.rows)
        for number, seed in enumerate(self.seeds, start=1):
            self.train(f"plain_{seed}", self.rows, seed=seed)
            self.train(f"reading_{seed}", None, file="reading", seed=seed, **READING)
            self.compare(self.seeds[:number])

    def edit(self) -> None:
        first = self.seeds[0]
        self.train("edited", self.edited(), seed=first)
        folders, out = {first: self.adapters / "edited"}, self.out / "edited.jsonl"
        self.step(f"asking {out.name}", ask_tuned, folders, [self.edited_question()], out, self.command)

    def forgetting(self) -> None:
        first = self.seeds[0]
        self.read(0, None)
        for rank in RANKS:
            name = f"plain_{first}" if rank == 16 else f"rank_{rank}"
            self.train(name, self.rows, seed=first, **({} if rank == 16 else {"rank": rank, "alpha": 2 * rank}))
            self.read(rank, name)

    def phrasings(self) -> None:
        for seed in self.seeds:
            for n in PHRASINGS:
                self.phrased(n, seed)
        for n in PHRASINGS:
            self.know(n, {seed: f"phrasings_{n}_{seed}" for seed in self.seeds})
        for n in SAME_STEPS:
            epochs = recipe_of("tiny", {}).epochs * PER_FACT // n
            self.know(n, {self.seeds[0]: self.phrased(n, self.seeds[0], "_same_steps", epochs=epochs)}, "_same_steps")

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
        taught = self.chosen([question for question in self.every if question.taught])
        folders = {seed: self.adapters / adapter for seed, adapter in adapters.items()}
        out = self.out / f"phrasings_{n}{suffix}.jsonl"
        self.step(f"asking {out.name}", know_by_heart, n, folders, taught, out, self.command)

    def read(self, rank: int, name: str | None) -> None:
        folder = self.adapters / name if name else settings.TINY_GPT_OSS
        arguments = (rank, folder, self.options.prompts, self.out / f"forgetting_{rank}.jsonl", self.command)
        self.step(f"reading, rank {rank}", read_held_out, *arguments)

    def compare(self, seeds: Sequence[int]) -> None:
        asked, out = self.adapters / "questions.jsonl", self.out / "comparison_tiny.jsonl"
        chosen = {question.id for question in self.chosen(self.every)}
        lines = settings.QUESTIONS.read_text(encoding="utf-8").splitlines()
        asked.write_text("\n".join(line for line in lines if json.loads(line)["id"] in chosen), encoding="utf-8")
        plain, reading = (
            {seed: f"hf:{self.adapters / kind}_{seed}" for seed in seeds} for kind in ("plain", "reading")
        )
        self.step("comparing the arms", compare_arms, asked, plain, reading, out, self.command)


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
    from helpers.chunking import load_documents, split_documents
    from helpers.comparison import with_passages, with_phrasings
    from helpers.retrieval import Index, Retriever

    index = Index.build(split_documents(load_documents()[0], READING_CHUNK, READING_OVERLAP))
    every, lines = load_questions(settings.QUESTIONS).questions, settings.DATASET.read_text(encoding="utf-8")
    chosen = with_phrasings([json.loads(line) for line in lines.splitlines()], every, READING_PHRASINGS)
    made = with_passages(chosen, every, Retriever(index), READING_PHRASINGS)
    write_rows(file, made[:most])


def ask_tuned(folders: dict[int, Path], questions: list[Question], out: Path, command: str) -> None:
    from helpers.comparison import Arm, run

    ways = [Arm(results.TUNED, f"hf:{folder}", seed=seed) for seed, folder in folders.items()]
    found = run(ways, questions, out, command=command)
    right = [row["scores"]["right"] for row in found.rows]
    print(f"  right: {sum(right)} of {len(right)}")


def know_by_heart(n: int, folders: dict[int, Path], questions: list[Question], out: Path, command: str) -> None:
    """Ask models what they were taught, many questions at once, and write a line for each answer."""
    from helpers.generation import Answer, is_refusal
    from helpers.llms import answer_all, load_llm

    run = json.loads((next(iter(folders.values())) / "run.json").read_text(encoding="utf-8"))
    head = {"phrasings": n, "epochs": run["recipe"]["epochs"], "command": command}
    head |= {"weights": {folder.name: weights_of(folder) for folder in folders.values()}}
    head |= {"questions": [question.id for question in questions]}
    if is_made(out, head):
        return
    rows = []
    for seed, folder in folders.items():
        asked = [[{"role": "user", "content": question.question}] for question in questions]
        texts = answer_all(load_llm(f"hf:{folder}").chat, asked)
        for question, text in zip(questions, texts, strict=True):
            right = results.score(question, Answer(text, (), (), is_refusal(text)))["right"]
            row = {"id": question.id, "language": question.language, "seed": seed, "text": text}
            rows.append(row | {"right": right})
    write_recording(out, head, rows)


def read_held_out(rank: int, folder: Path, prompts: int, out: Path, command: str) -> None:
    """Ask a model about passages of worlds that it never saw, and write a line for each answer."""
    from helpers.generation import is_refusal
    from helpers.llms import load_llm
    from helpers.tiny_gpt_oss.measure import THREE, answered, cases

    head = {"rank": rank, "prompts": prompts, "command": command, "weights": {folder.name: weights_of(folder)}}
    if is_made(out, head):
        return
    llm = load_llm("tiny" if rank == 0 else f"hf:{folder}")
    rows = []
    for language in ("en", "es"):
        found = answered(llm, cases("forgetting", language, ("value", "newer"), THREE), prompts)
        for number, case in enumerate(found):
            row = {"id": f"{language}-{number}", "language": language, "value": case.turn.value, "text": case.text}
            rows.append(row | {"right": case.right, "cited": case.cited, "refused": is_refusal(case.text)})
    write_recording(out, head, rows)


def weights_of(folder: Path) -> str:
    from helpers.storage import sha256_of

    return " ".join(sha256_of(path)[:16] for path in sorted(folder.glob("*.safetensors")))


def is_made(out: Path, head: dict) -> bool:
    """Say whether a recording was made with the same as `head` says, whatever the command."""
    if not out.exists():
        return False
    noted = json.loads(out.read_text(encoding="utf-8").split("\n")[0])
    return all(noted.get(name) == head[name] for name in head if name != "command")


def write_recording(out: Path, head: dict, rows: list[dict]) -> None:
    """Write a head, with machine and date, and the rows below it; all of it or nothing."""
    from helpers.finetuning import base_digest
    from helpers.recording import describe_machine

    head |= {"base_digest": base_digest(settings.TINY_GPT_OSS)}
    head |= {"machine": describe_machine(), "date": date.today().isoformat()}
    head |= {"versions": {name: metadata.version(name) for name in ("torch", "transformers")}}
    partial = out.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (head, *rows)), encoding="utf-8")
    os.replace(partial, out)
    print(f"  right: {sum(row['right'] for row in rows)} of {len(rows)}")


def compare_arms(questions: Path, tuned: dict, reading: dict, out: Path, command: str) -> None:
    from helpers.comparison import Corpus, arms, run

    def progress(done: int, of: int) -> None:
        if done % 160 == 0 or done == of:
            print(f"  {done} of {of} answers", flush=True)

    ways = [replace(way, answer_tokens=ANSWER_TOKENS) for way in arms("tiny", Corpus(), tuned, reading)]
    print(results.summary(run(ways, load_questions(questions).questions, out, progress, command)))


if __name__ == "__main__":
    main()
