"""Give the embedded model fewer and fewer sentences of the passages, on the development questions, and keep the rows.

python tests/tools/sweep_sentences.py [--out FILE] [--sentences N …]

A first line says with what; then one a number of sentences (0: the passages whole) and question: whether the model
answered rightly or refused, by itself, how sure the search was, and what it took. Notebook 04 shows it.
"""

import argparse
import json
import time
from pathlib import Path

from helpers import settings
from helpers.evaluation import Question, contains_answer, load_questions
from helpers.generation import fit, is_refusal
from helpers.llms import LLM, load_llm
from helpers.quotes import confidence, excerpts, rank_sentences
from helpers.recording import made_with
from helpers.retrieval import Index, Retriever


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=settings.RESULTS / "sentences.jsonl", help="file of the rows")
    parser.add_argument("--sentences", type=int, nargs="+", default=[0, 2, 4, 6, 10], help="default %(default)s")
    options, started = parser.parse_args(), time.perf_counter()
    index, _ = Index.open()
    retriever, llm, asked = Retriever(index), load_llm("tiny"), load_questions(split="dev").questions
    rows = [made_with(llm, retriever, asked)]
    for sentences in options.sentences:
        for question in asked:
            row = {"sentences": sentences, "id": question.id, "answerable": question.answerable}
            rows.append(row | answered(llm, question, retriever, sentences))
        print(line_of([row for row in rows[1:] if row["sentences"] == sentences]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    taken = settings.format_seconds(time.perf_counter() - started)
    print(f"{len(rows) - 1} answers in {taken}, now in {options.out.name}")


def answered(llm: LLM, question: Question, retriever: Retriever, sentences: int) -> dict:
    """Ask the model, however unsure the search is: `helpers.generation.answer` wouldn't."""
    hits = retriever.search(question.question)
    ranked = rank_sentences(question.question, hits)
    given = excerpts(hits, ranked, sentences) if sentences else hits
    started = time.perf_counter()
    _, messages, tokens = fit(question.question, given, llm)
    text = "".join(llm.stream(messages))
    seconds, refused = time.perf_counter() - started, is_refusal(text)
    right = question.answerable and not refused and contains_answer(text, question.answers, question.language)
    sure = confidence(question.question, retriever, hits, ranked)
    found = {"right": right, "refused": refused, "sure": round(sure, 4)}
    return found | {"prompt_tokens": tokens, "seconds": round(seconds, 3)}


def line_of(rows: list[dict]) -> str:
    """Return a row of the table: by the model alone, and where the search has to be sure as well."""
    can, cannot = ([row for row in rows if row["answerable"] == answerable] for answerable in (True, False))
    parts = []
    for least in (float("-inf"), settings.QUOTES_THRESHOLD):
        refused = [sum(row["refused"] or row["sure"] < least for row in some) for some in (cannot, can)]
        right = sum(row["right"] and row["sure"] >= least for row in can)
        parts.append(f"right {right} of {len(can)}, refused {refused[0]} of {len(cannot)}, wrongly {refused[1]}")
    tokens = sum(row["prompt_tokens"] for row in rows) / len(rows)
    return f"{rows[0]['sentences'] or 'whole':>5}: {parts[0]}; with the search {parts[1]}; {tokens:.0f} tokens"


if __name__ == "__main__":
    main()
