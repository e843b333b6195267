"""Recorded answers: the test questions put to a model once, kept as raw rows with what they were made with.

Notebooks 04 and 06 show them beside what the embedded model answers live.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

from helpers import settings
from helpers.evaluation import Question, load_questions
from helpers.generation import NOT_THERE, answer, passages_of, rag_messages
from helpers.llms import LLM, TransformersChat, load_llm
from helpers.retrieval import Hit, Retriever


def record(
    name: str,
    retriever: Retriever,
    out: Path = settings.RESULTS,
    questions: Path = settings.QUESTIONS,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Answer the test questions with the model `name`; return the JSON lines file in `out` that holds the answers.

    The first line says with what: model, digest, machine, date. Each line is written as it is answered; a run that was
    stopped goes on where it was if its first line still fits. A row's 'refusal' is the probability that the model gave
    to saying that the passages don't say; None where it can't be seen.
    """
    llm = load_llm(name)
    asked = load_questions(questions, "test").questions
    head = {
        "model": llm.name,
        "digest": llm.digest,
        "context": llm.context,
        "versions": {package: metadata.version(package) for package in ("langchain-core", "ollama", "transformers")},
        "machine": describe_machine(),
        "command": f"python -m helpers record --llm {name}",
        "date": date.today().isoformat(),
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"answers_{re.sub(r'[^A-Za-z0-9.-]+', '_', llm.name)}.jsonl"
    partial = path.with_suffix(".partial")
    done = _read(partial)
    same = done and {**done[0], "date": ""} == {**head, "date": ""}
    answered = {row["id"] for row in done[1:]} if same else set()
    with partial.open("w", encoding="utf-8") as file:
        for row in done if same else [head]:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for number, question in enumerate(asked, 1):
            if question.id not in answered:
                given = answer(question.question, retriever, llm)
                row = {
                    "id": question.id,
                    "text": given.text,
                    "refused": given.refused,
                    "refusal": _refusal(question, given.hits, llm),
                    "cited": [[cited.number, cited.file, cited.page] for cited in given.citations],
                    "invented": list(given.invented),
                    "hits": [[hit.chunk.file, hit.chunk.page] for hit in given.hits],
                    "prompt_tokens": given.prompt_tokens,
                    "seconds": {step: round(seconds, 3) for step, seconds in given.timings.items()},
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
            if progress:
                progress(number, len(asked))
    os.replace(partial, path)
    return path


def _refusal(question: Question, hits: Sequence[Hit], llm: LLM) -> float | None:
    if not isinstance(llm.chat, TransformersChat):
        return None
    messages = rag_messages(question.question, passages_of(hits))
    return round(llm.chat.probability(messages, NOT_THERE[question.language]), 6)


def recorded(folder: Path = settings.RESULTS) -> dict[str, tuple[dict, list[dict]]]:
    """Return what was recorded, by model: (with what, rows). Raises ValueError for a file that isn't such a record."""
    found = {}
    for path in sorted(folder.glob("answers_*.jsonl")):
        rows = _read(path)
        if not rows or "model" not in rows[0]:
            raise ValueError(
                f"{path.name} is no record of answers: delete it, or make it with `python -m helpers record`."
            )
        found[rows[0]["model"]] = (rows[0], rows[1:])
    return found


def describe_machine() -> str:
    """Return this machine in a few words: system, cores, GPU."""
    here = settings.machine()
    return f"{here.system}, {here.cores} cores" + (f", {here.gpu}" if here.gpu else "")


def _read(path: Path) -> list[dict]:
    """Return the rows of a JSON lines file; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
