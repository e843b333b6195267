"""The terminal: python -m helpers ask | chat | record | index | evaluate | doctor."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from helpers import settings

LEAVE = {"salir", "exit", "quit"}
SAY = {
    "en": {"sources": "Sources", "stopped": "Stopped.", "dropped": "Left out, no room", "asked": "Asked"},
    "es": {"sources": "Fuentes", "stopped": "Detenido.", "dropped": "Omitido, no cabe", "asked": "Pregunta"},
}
YES = {"y", "yes", "s", "si", "sí"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code: 0, or 2 with one sentence on standard error."""
    options = _parser().parse_args(arguments)
    from helpers.ollama import OllamaError
    from helpers.storage import IndexRefused

    try:
        return options.run(options)
    except (OSError, ValueError, IndexRefused, OllamaError) as error:
        print(f"helpers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description="Ask the documents of a folder.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, what: str, docs: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=what)
        sub.set_defaults(run=run)
        if docs:
            sub.add_argument("--docs", type=Path, default=settings.DOCUMENTS, help="folder of PDF and TXT files")
        return sub

    for name, run, what in (("ask", _ask, "answer one question"), ("chat", _chat, "answer questions until 'salir'")):
        sub = command(name, run, what)
        sub.add_argument("--top-k", type=int, default=settings.TOP_K, help="passages to read (default %(default)s)")
        sub.add_argument("--mode", choices=settings.MODES, default="hybrid", help="search by meaning, words or both")
        sub.add_argument("--llm", default="auto", help="auto, ollama:MODEL, hf:NAME_OR_FOLDER, tiny or quotes")
        if name == "ask":
            sub.add_argument("question")
            sub.add_argument("--json", action="store_true", help="print the answer as JSON")
    sub = command("record", _record, "answer the test questions with a model and keep its answers")
    sub.add_argument("--llm", default=f"ollama:{settings.OLLAMA_MODEL}", help="as for chat (default %(default)s)")
    sub.add_argument("--out", type=Path, default=settings.RESULTS, help="folder of the recorded answers")
    command("index", _index, "build or update the index of a folder")
    sub = command("evaluate", _evaluate, "measure search and quotes on question files")
    sub.add_argument("files", type=Path, nargs="+", help="JSON lines or SQuAD's JSON; a folder means all in it")
    sub.add_argument("--split", choices=("dev", "test", "all"), default="test", help="which questions of JSON lines")
    command("doctor", _doctor, "say what this machine has and lacks", docs=False)
    return parser


def _progress(what: str, unit: str = "window"):
    """Return a callback that draws a bar on a terminal, and None where nobody watches."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = tqdm(desc=what, unit=unit, leave=False)

    def advance(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return advance


def _open(options: argparse.Namespace, embedder=None):
    """Return the up-to-date index of the folder, saying on standard error what was done for it."""
    from helpers.retrieval import Index

    index, update = Index.open(options.docs, embedder, progress=_progress("Embedding"))
    for row in update.report:
        if row.problem:
            print(f"Not read in full: {row}", file=sys.stderr)
    if update:
        counts = f"{len(update.added)} new, {len(update.changed)} changed, {len(update.removed)} removed"
        print(f"Index updated: {counts}, {len(update.kept)} kept; {len(index.chunks)} chunks.", file=sys.stderr)
    return index


def _ask(options: argparse.Namespace) -> int:
    from helpers.generation import answer
    from helpers.retrieval import Retriever

    if not options.question.strip():
        raise ValueError('The question is empty: write one, for example: ask "Who keeps the light of Roca Tordo?"')
    retriever = Retriever(_open(options), options.mode, options.top_k)
    llm = _load(options)
    if options.json:
        given = answer(options.question, retriever, llm)
        print(json.dumps({"question": options.question} | dataclasses.asdict(given), ensure_ascii=False, indent=2))
    else:
        _show(options.question, answer(options.question, retriever, llm, stream=_print))
    return 0


def _load(options: argparse.Namespace):
    """Return the model to answer with, saying which and why; ask before a download of many gigabytes."""
    from helpers import ollama
    from helpers.llms import load_llm

    llm = load_llm(options.llm, fallback="tiny" if (settings.TINY_GPT_OSS / "model.safetensors").exists() else "quotes")
    if options.llm == "auto" and sys.stdin.isatty() and sys.stderr.isatty():
        name, gigabytes, memory = settings.OLLAMA_MODELS[0]
        if not llm.name.startswith("ollama:") and ollama.look().binary and "HELPERS_LLM" not in os.environ:
            reply = input(f"Fetch {name} with Ollama ({gigabytes:.0f} GB; it needs {memory:.0f} GB of memory)? [y/N] ")
            if reply.strip().lower() in YES:
                return load_llm(f"ollama:{name}", pull=True)
    print(f"Model: {llm.name}" + (f" ({llm.why})" if llm.why else ""), file=sys.stderr)
    return llm


def _print(piece: str) -> None:
    print(piece, end="", flush=True)


def _show(question: str, given) -> None:
    """Print what goes below an answer that was already streamed: its places, and how long it took."""
    from helpers.language import detect_language

    say = SAY[detect_language(question)]
    print()
    if given.question and given.question != question:
        print(f"{say['asked']}: {given.question}")
    if given.citations:
        language = detect_language(question)
        places = dict.fromkeys(f"[{citation.number}] {citation.place(language)}" for citation in given.citations)
        print(f"{say['sources']}: " + "; ".join(places))
    if given.dropped:
        print(f"{say['dropped']}: " + "; ".join(f"{hit.chunk.file}, {hit.chunk.page}" for hit in given.dropped))
    print(f"({settings.format_seconds(sum(given.timings[step] for step in ('retrieve', 'answer')))})")


def _chat(options: argparse.Namespace) -> int:
    from helpers.chunking import find_files
    from helpers.embeddings import Embedder
    from helpers.ollama import OllamaError

    find_files(options.docs)  # a folder that isn't there is said before the model is loaded
    llm = _load(options)
    embedder = Embedder()
    _open(options, embedder)
    talking = sys.stdin.isatty()
    if talking:
        print("Ask in English or Spanish; 'salir' or Ctrl-D leaves. / Pregunte en español o inglés; «salir» termina.")
    history: list[tuple[str, str]] = []
    while True:
        try:
            question = input("\n> ") if talking else sys.stdin.readline()
            if not talking and not question:
                return 0
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n('salir')")
            continue
        question = question.strip()
        if question.lower() in LEAVE:
            return 0
        if not question:
            continue
        try:
            given = _reply(options, question, llm, history, embedder)
            history.append((given.question or question, given.text))
        except KeyboardInterrupt:
            from helpers.language import detect_language

            print("\n" + SAY[detect_language(question)]["stopped"])
        except (OllamaError, ValueError) as error:  # one question failed: the chat goes on
            print(f"\nhelpers: {error}", file=sys.stderr)
        sys.stdout.flush()


def _reply(options: argparse.Namespace, question: str, llm, history: list[tuple[str, str]], embedder):
    """Answer one question of a chat, printing it as it comes."""
    from helpers.generation import answer
    from helpers.retrieval import Retriever

    # The documents may have changed since the last question: reading the index again takes a few hundredths.
    retriever = Retriever(_open(options, embedder), options.mode, options.top_k)
    given = answer(question, retriever, llm, history, stream=_print)
    _show(question, given)
    return given


def _record(options: argparse.Namespace) -> int:
    from helpers.recording import record
    from helpers.retrieval import Retriever

    path = record(options.llm, Retriever(_open(options)), options.out, progress=_progress("Answering", "question"))
    print(path)
    return 0


def _index(options: argparse.Namespace) -> int:
    index = _open(options)
    for name in sorted(index.files):
        if name not in index.problems:
            print(f"  {name}: {sum(chunk.file == name for chunk in index.chunks)} chunks")
    for problem in index.problems.values():
        print(f"! {problem}")
    print(f"{len(index.files)} files, {len(index.chunks)} chunks, {len(index.vectors)} vectors: up to date.")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from helpers.embeddings import Embedder
    from helpers.evaluation import BadQuestions, check_against_pages, load_questions
    from helpers.retrieval import Index

    files = [name for path in options.files for name in (_question_files(path) if path.is_dir() else [path])]
    split = None if options.split == "all" else options.split
    sets = [load_questions(path, split) for path in files]  # all faults are said before anything is embedded
    embedder = Embedder()
    for path, questions in zip(files, sets, strict=True):
        if questions.passages is None:
            from helpers.chunking import load_documents

            faults = check_against_pages(questions.questions, load_documents(options.docs)[0])
            if faults:
                raise BadQuestions(f"{path.name} doesn't fit the documents:\n  " + "\n  ".join(faults))
            index = _open(options, embedder)
        else:
            names = [{"file": name} for name in questions.passages]
            index = Index.from_texts(list(questions.passages.values()), names, embedder, _progress("Embedding"))
        which = f", split {options.split}" if questions.passages is None else ""
        print(f"\n{path.name}{which}: {len(questions.questions)} questions, {len(index.chunks)} chunks\n")
        _print_evaluation(index, questions)
    return 0


def _question_files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jsonl"))
    if not found:
        raise ValueError(f"There is no .json or .jsonl file in {folder}.")
    return found


def _print_evaluation(index, questions) -> None:
    from helpers.evaluation import evaluate_retrieval
    from helpers.quotes import evaluate_quotes

    print("Search            language     n  recall@1  recall@3 [95 % interval]   recall@10    MRR")
    for row in evaluate_retrieval(index, questions):
        shares = f"{row.recall[1].value:8.3f}  {row.recall[3]!s:24}  {row.recall[10].value:9.3f}"
        print(f"{row.mode:<17} {row.language:<8} {row.recall[3].n:5d}  {shares}  {row.mrr:5.3f}")
    print("\nQuotes            language     n  share [95 % interval]")
    for language, scores in evaluate_quotes(index, questions).items():
        for what, share in (
            ("answer quoted", scores.quoted),
            ("… and not refused", scores.right),
            ("refused, rightly", scores.refused_unanswerable),
            ("refused, wrongly", scores.refused_answerable),
        ):
            if share.n:
                print(f"{what:<17} {language:<8} {share.n:5d}  {share}")
        print(f"{'characters':<17} {language:<8}        median {scores.median_length:.0f}, longest {scores.longest}")


def _doctor(options: argparse.Namespace) -> int:
    from helpers.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{finding.subject:<13} {finding.found}")
        if finding.mend:
            print(f"{'':<13} -> {finding.mend}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
