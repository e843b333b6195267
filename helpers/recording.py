"""Recorded answers: the test questions put to a model once, kept as raw rows with what they were made with.

Notebooks 04 and 06 show them beside what the embedded model answers live.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TextIO

from helpers import ollama, settings
from helpers.evaluation import Question, load_questions
from helpers.four_bit import base_digest
from helpers.generation import NOT_THERE, Answer, answer, passages_of, rag_messages
from helpers.llms import LLM, PromptTooLong, TransformersChat, load_llm, place_of
from helpers.ollama import NoText, PromptCut
from helpers.quotes import confidence, rank_sentences
from helpers.retrieval import Hit, Retriever
from helpers.storage import locked, sha256_of

FAILURES = (NoText, PromptCut, PromptTooLong)  # asked again, a question would fail again: its row says so


def record(
    name: str,
    retriever: Retriever,
    out: Path = settings.RESULTS,
    questions: Path = settings.QUESTIONS,
    progress: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Path:
    """Answer the test questions with the model `name`; return the JSON lines file in `out` that holds the answers.

    The first line says with what: model, documents, questions, machine, date. Each line is written as it is answered; a
    run that was stopped goes on where it was. A row's 'refusal' is the probability that the model gave to saying that
    the passages don't say; None where it can't be seen. 'sure' is how sure the search is that it found the answer, see
    `quotes.confidence`. Raises ValueError where the file was begun with something else, TimeoutError where another
    process is at it.
    """
    llm = load_llm(name)
    asked = load_questions(questions, "test").questions
    head = made_with(llm, retriever, asked) | {
        "context": llm.context,
        "answer_tokens": llm.answer_tokens,
        "sentences": llm.sentences,
        "mode": retriever.mode,
        "top_k": retriever.top_k,
        "versions": {package: metadata.version(package) for package in ("langchain-core", "ollama", "transformers")},
        "command": command or f"helpers.recording.record({name!r})",
    }
    if llm.name.startswith("ollama:"):
        head["versions"]["ollama server"] = ollama.Ollama().version()
    path = out / f"answers_{re.sub(r'[^A-Za-z0-9.-]+', '_', llm.name)}.jsonl"
    with locked(path, seconds=0):
        _answer(asked, retriever, llm, head, path.with_suffix(".partial"), progress)
        os.replace(path.with_suffix(".partial"), path)
    return path


def _answer(asked: Sequence[Question], retriever: Retriever, llm: LLM, head: dict, partial: Path, progress) -> None:
    """Write `head` and a row for each question to the file `partial`, after those that are there already."""
    answered = {row["id"] for row in taken_up(partial, head)}
    with partial.open("a", encoding="utf-8") as file:
        for number, question in enumerate(asked, 1):
            if question.id not in answered:
                try:
                    given, failed = answer(question.question, retriever, llm), {}
                except FAILURES as error:
                    given, failed = Answer("", (), (), refused=False), {"error": str(error)}
                row = failed | {
                    "id": question.id,
                    "text": given.text,
                    "refused": given.refused,
                    "refusal": _refusal(question, given.hits, llm),
                    "sure": _sure(question, retriever),
                    "cited": [[cited.number, cited.file, cited.page] for cited in given.citations],
                    "invented": list(given.invented),
                    "hits": [[hit.chunk.file, hit.chunk.page] for hit in given.hits],
                    "prompt_tokens": given.prompt_tokens,
                    "seconds": {step: round(seconds, 3) for step, seconds in given.timings.items()},
                }
                add_row(file, row)
            if progress:
                progress(number, len(asked))


def taken_up(partial: Path, head: dict) -> list[dict]:
    """Return the rows that a stopped run left in the file `partial`, which is then ready for more.

    Raises ValueError where its first line isn't `head`, whatever the day and the command.
    """
    begun = _read(partial, partial=True) or [head]
    fields = (begun[0] | head).keys() - {"date", "command"}
    if other := sorted(name for name in fields if begun[0].get(name) != head.get(name)):
        raise ValueError(f"{partial} was begun with other {', '.join(other)}: delete that file to begin anew.")
    aside = partial.with_suffix(".new")  # so that a kill now loses no row
    with aside.open("w", encoding="utf-8") as file:
        for row in begun:
            add_row(file, row)
    os.replace(aside, partial)
    return begun[1:]


def add_row(file: TextIO, row: dict) -> None:
    """Write a row as a line of JSON, so that a kill can't lose it."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def _sure(question: Question, retriever: Retriever) -> float:
    hits = retriever.search(question.question)
    ranked = rank_sentences(question.question, hits)
    return round(confidence(question.question, retriever, hits, ranked), 4)


def _refusal(question: Question, hits: Sequence[Hit], llm: LLM) -> float | None:
    if not isinstance(llm.chat, TransformersChat):
        return None
    messages = rag_messages(question.question, passages_of(hits), llm.marks)
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


def made_with(llm: LLM, retriever: Retriever, asked: Sequence[Question]) -> dict[str, str]:
    """Return with what answers are made: the model and its weights, documents, questions, machine and date."""
    return {
        "model": llm.name,
        "digest": digest_of(llm),
        "documents": documents_of(retriever),
        "questions": hash_of([asdict(question) for question in asked]),
        "machine": describe_machine(),
        "date": date.today().isoformat(),
    }


def describe_machine() -> str:
    """Return this machine in a few words: system, cores, GPU."""
    here = settings.machine()
    return f"{here.system}, {here.cores} cores" + (f", {here.gpu}" if here.gpu else "")


def hash_of(parts: Sequence) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]


def digest_of(llm: LLM) -> str:
    """Return what names a model's weights: its own digest, a hash of its folder's files, or its name on the hub."""
    if llm.digest or not llm.name.startswith("hf:"):
        return llm.digest
    files = sorted(place_of(llm.name).glob("*.safetensors"))
    return hash_of([sha256_of(path) for path in files]) if files else base_digest(llm.name.removeprefix("hf:"))


def documents_of(retriever: Retriever) -> str:
    """Return a hash of all that decides what is found: chunks, encoder, mode and number of passages."""
    chunks = [[chunk.file, chunk.page, chunk.text] for chunk in retriever.index.chunks]
    return hash_of([retriever.mode, retriever.top_k, retriever.index.embedder.fingerprint, chunks])


def _read(path: Path, partial: bool = False) -> list[dict]:
    """Return the rows of a JSON lines file; of a `partial` one without a last line that a kill has cut off.

    Raises ValueError for a line that is no JSON.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().decode("utf-8", "replace").split("\n")
    rows = []
    for number, line in enumerate(lines if partial or not last else [*lines, last], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: delete that file, and record it anew.") from error
    return rows
