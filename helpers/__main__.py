"""The terminal: python -m helpers ask | chat | index | evaluate | train | export | record | compare | doctor."""

import argparse
import dataclasses
import io
import json
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from helpers import settings

LEAVE = {"salir", "exit", "quit"}
SAY = {
    "en": {"sources": "Sources", "stopped": "Stopped.", "asked": "Asked"},
    "es": {"sources": "Fuentes", "stopped": "Detenido.", "asked": "Pregunta"},
}
YES = {"y", "yes", "s", "si", "sí"}
CHANGES = {"epochs": int, "learning_rate": float, "rank": int, "batch": int, "max_length": int, "seed": int}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code: 0, or 2 with one sentence on standard error."""
    options = _parser().parse_args(arguments)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115  it is None where the caller has closed it
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # on Windows a file or pipe gets a code page, without '≥'
    if options.run is not _train:
        # Else some libraries import PyTorch's compiler, which takes seconds. Only a training might use it.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        from helpers.ollama import OllamaError
        from helpers.storage import IndexRefused
    except ModuleNotFoundError as error:
        print(
            f"helpers: {sys.executable} has no {error.name}: run `make lab` once, use .venv/bin/python", file=sys.stderr
        )
        return 2
    try:
        return options.run(options)
    except BrokenPipeError:  # its reader has enough: `index | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, IndexRefused, OllamaError) as error:
        print(f"helpers: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        print("helpers: Memory ran out: take a smaller model, or give it fewer passages (--top-k).", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(stop, file=sys.stderr)
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
    sub = command("compare", _compare, "ask every arm the same questions: what each gets right, and what it costs")
    sub.add_argument("--llm", default="auto", help="the base: auto, ollama:MODEL, hf:NAME_OR_FOLDER or tiny")
    sub.epilog = "All that notebook 06 draws, trainings too, is made by: python tests/tools/run_comparison.py"
    own = f"(default {settings.FINE_TUNED.name}/, if it is of that base; none: no such arm)"
    sub.add_argument("--tuned", action="append", help=f"folder of an adapter of that base, once a seed {own}")
    sub.add_argument("--reading", action="append", default=[], help="the same, trained with passages in its examples")
    sub.add_argument("--questions", type=Path, default=settings.QUESTIONS, help="JSON lines (default %(default)s)")
    sub.add_argument("--split", choices=("dev", "test", "all"), default="all", help="which questions")
    sub.add_argument("--out", type=Path, help="file of the rows, to go on from after a kill (default: one in runs/)")
    sub = command("evaluate", _evaluate, "measure search and quotes on question files")
    sub.add_argument("files", type=Path, nargs="+", help="JSON lines or SQuAD's JSON; a folder means all in it")
    sub.add_argument("--split", choices=("dev", "test", "all"), default="test", help="which questions of JSON lines")
    sub = command("train", _train, "train an adapter on a training set; the same command goes on with it", False)
    sub.add_argument("--base", default="auto", help="auto, gpt-oss-20b, small, tiny, a hub name or a folder")
    sub.add_argument("--dataset", type=Path, default=settings.DATASET, help="JSON lines (default %(default)s)")
    sub.add_argument("--out", type=Path, default=settings.FINE_TUNED, help="folder of the adapter")
    for name, kind in CHANGES.items():
        sub.add_argument(f"--{name.replace('_', '-')}", type=kind, help="instead of the base's own")
    sub.add_argument("--plan", action="store_true", help="say what it takes, and train nothing")
    sub = command("export", _export, "add an adapter to its base, for other programs: a folder, GGUF, Ollama", False)
    sub.add_argument("--adapter", type=Path, default=settings.FINE_TUNED, help="folder (default %(default)s)")
    sub.add_argument("--out", type=Path, default=settings.RUNS / "merged", help="folder (default %(default)s)")
    sub.add_argument("--gguf", action="store_true", help="write the model as a GGUF file too, beside that folder")
    sub.add_argument("--ollama", metavar="NAME", help="give that file to Ollama as the model NAME")
    sub.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the GGUF file's matrices")
    command("doctor", _doctor, "say what this machine has and lacks", docs=False)
    return parser


def _progress(what: str, unit: str = "window"):
    """Return a callback that draws a bar on a terminal, and None where nobody watches."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = tqdm(desc=what, unit=unit, leave=False)

    def advance(done: int, total: int, note: str = "") -> None:
        bar.total = total
        bar.set_postfix_str(note, refresh=False)
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

    # An argument that is no UTF-8 has surrogates in it, which no tokenizer takes.
    options.question = options.question.encode(errors="surrogateescape").decode(errors="replace")
    if not options.question.strip():
        raise ValueError('The question is empty: write one, for example: ask "Who keeps the light of Roca Tordo?"')
    llm = _load(options)  # first: a name that is wrong is better said before a large folder is embedded
    retriever = Retriever(_open(options), options.mode, options.top_k)
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

    llm = load_llm(options.llm)  # without Ollama quotes answer: from real documents better than the embedded model
    if options.llm == "auto" and sys.stdin.isatty() and sys.stderr.isatty():
        name, gigabytes, memory = settings.OLLAMA_MODELS[0]
        missing = not llm.name.startswith("ollama:") and not os.environ.get("HELPERS_LLM")
        if missing and ollama.look().models is not None:  # it answers, and has no such model
            asked = f"Fetch {name} with Ollama ({gigabytes:.0f} GB; it needs {memory:.0f} GB of memory)? [y/N] "
            print(asked, end="", file=sys.stderr, flush=True)  # standard output is the answer's
            with suppress(EOFError):  # Ctrl-D is no
                if input().strip().lower() in YES:
                    return load_llm(f"ollama:{name}", pull=True)
    print(f"Model: {llm.name}" + (f" ({llm.why})" if llm.why else ""), file=sys.stderr)
    return llm


def _print(piece: str) -> None:
    print(piece, end="", flush=True)


def _show(question: str, given) -> None:
    """Print what goes below an answer that was already streamed: its places, and how long it took."""
    from helpers.chunking import printable
    from helpers.language import detect_language

    language = detect_language(question)
    say = SAY[language]
    print()
    if given.question and given.question != question:
        print(f"{say['asked']}: {given.question}")
    if given.citations:
        places = dict.fromkeys(f"[{citation.number}] {citation.place(language)}" for citation in given.citations)
        print(f"{say['sources']}: {printable('; '.join(places))}")
    for note in given.notes(language):
        print(note)
    print(f"({settings.format_seconds(sum(given.timings[step] for step in ('retrieve', 'answer')))})")


def _chat(options: argparse.Namespace) -> int:
    from helpers.chunking import find_files
    from helpers.embeddings import Embedder

    find_files(options.docs)  # a folder that isn't there is said before the model is loaded
    llm = _load(options)
    llm.warm_up()
    embedder = Embedder()
    _open(options, embedder)
    sys.stdin.reconfigure(errors="replace")  # a byte that is no UTF-8 ends no chat
    if sys.stdin.isatty():
        print("Ask in English or Spanish; 'salir' or Ctrl-D leaves. / Pregunte en español o inglés; «salir» termina.")
    interrupt, history = Interrupt(), []
    with interrupt:
        while True:
            try:
                return _converse(options, llm, history, embedder, interrupt)
            except KeyboardInterrupt:
                print("\n('salir')")


class Interrupt:
    """Ctrl-C in a chat: it stops what is being done, once, and never the chat.

    Python raises KeyboardInterrupt wherever it stands, also while the one before is dealt with. This raises it only if
    it was armed, and then has to be armed again; or a second later, in case the first was lost in a library.
    """

    armed, last = False, 0.0

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self)

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.before)

    def __call__(self, number, frame):
        if self.armed or time.monotonic() > self.last + 1:
            self.armed, self.last = False, time.monotonic()
            raise KeyboardInterrupt


def _converse(options: argparse.Namespace, llm, history: list, embedder, interrupt: Interrupt) -> int:
    """Read questions and answer them until the person leaves; return the exit code."""
    from helpers.storage import IndexRefused

    talking = sys.stdin.isatty()
    while True:
        interrupt.armed = True
        try:
            question = input("\n> ") if talking else sys.stdin.readline()
        except EOFError:
            print()
            return 0
        if not talking and not question:
            return 0
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
        except (OSError, ValueError, RuntimeError, IndexRefused) as error:  # one question failed: the chat goes on
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
    from helpers.chunking import load_documents
    from helpers.evaluation import check_fit, load_questions
    from helpers.recording import record
    from helpers.retrieval import Retriever

    check_fit(settings.QUESTIONS, load_questions(split="test"), load_documents(options.docs)[0])
    progress, command = _progress("Answering", "question"), shlex.join(["python", "-m", "helpers", *sys.argv[1:]])
    print(record(options.llm, Retriever(_open(options)), options.out, progress=progress, command=command))
    return 0


def _index(options: argparse.Namespace) -> int:
    from helpers.chunking import printable

    index = _open(options)
    for name in sorted(index.files):
        if name not in index.problems:
            print(f"  {printable(name)}: {sum(chunk.file == name for chunk in index.chunks)} chunks")
    for problem in index.problems.values():
        print(f"! {problem}")
    print(f"{len(index.files)} files, {len(index.chunks)} chunks, {len(index.vectors)} vectors: up to date.")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from helpers.chunking import load_documents
    from helpers.embeddings import Embedder
    from helpers.evaluation import BadQuestions, check_fit, load_questions
    from helpers.retrieval import Index

    files = [name for path in options.files for name in (_question_files(path) if path.is_dir() else [path])]
    split = None if options.split == "all" else options.split
    sets = [load_questions(path, split) for path in files]  # all faults are said before anything is embedded
    for path, questions in zip(files, sets, strict=True):
        if not questions.questions:
            raise BadQuestions(f"{path.name} has no question of the split {split!r}: name another with --split.")
    embedder = Embedder()
    for path, questions in zip(files, sets, strict=True):
        if questions.passages is None:
            check_fit(path, questions, load_documents(options.docs)[0])
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


def _compare(options: argparse.Namespace) -> int:
    from helpers.comparison import adapters, compare, own_adapter
    from helpers.results import summary

    tuned = adapters(name for name in options.tuned or () if name != "none")
    if not options.tuned and (tuned := own_adapter(options.llm)):
        print(f"Fine-tuned: {settings.FINE_TUNED.name}/ is of this base (leave it out: --tuned none).", file=sys.stderr)
    split = None if options.split == "all" else options.split
    progress, command = _progress("Answering", "question"), shlex.join(["python", "-m", "helpers", *sys.argv[1:]])
    reading = adapters(options.reading)
    found, path = compare(
        options.llm, options.docs, options.questions, tuned, reading, options.out, split, progress, command
    )
    print(f"{summary(found)}\n\nThe rows: {path}")
    return 0


def _train(options: argparse.Namespace) -> int:
    from helpers.finetuning import prepare, train

    changes = {name: getattr(options, name) for name in CHANGES if getattr(options, name) is not None}
    if options.plan:
        planned = prepare(options.base, options.dataset, **changes)[0]
        print(planned)
        planned.check()
        return 0
    try:
        done = train(options.base, options.dataset, options.out, watch=_losses(), **changes)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped. The same command goes on from the last checkpoint.") from None
    took, held = settings.format_seconds(done.seconds), done.peak_memory / 2**30
    print(f"Trained in {took} with {held:.2f} GiB at most ({done.plan.total:.2f} planned).")
    print(f"The adapter: {done.folder}. Talk to it: python -m helpers chat --llm {shlex.quote(f'hf:{done.folder}')}")
    return 0


def _losses():
    """Return what shows a training's losses: a bar on a terminal, elsewhere a line for each evaluation."""
    advance, last = _progress("Training", "step"), {}

    def watch(losses: list[dict], step: int, steps: int) -> None:
        last.update(losses[-1] if losses else {})
        named = {"loss": "loss", "eval_loss": "held out"}
        note = ", ".join(f"{name} {last[key]:.3f}" for key, name in named.items() if key in last)
        if advance:
            advance(step, steps, note)
        elif losses and "eval_loss" in losses[-1]:
            print(f"Step {step} of {steps}: {note}", flush=True)

    return watch


def _export(options: argparse.Namespace) -> int:
    from helpers import export, ollama

    if options.ollama:
        ollama.Ollama().start()  # that it isn't there is better said before the hours that a large model takes
    apart = export.merge(options.adapter, options.out)
    print(f"{options.out}: the adapter moves its logits by {apart['effect']:.3g}, rounding by {apart['error']:.3g}.")
    if options.gguf or options.ollama:
        path = export.to_gguf(options.out, options.out.with_name(f"{options.out.name}.gguf"), options.dtype)
        path.with_suffix(".Modelfile").write_text(export.modelfile(path), encoding="utf-8")
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB, and how Ollama is to use it in {path.stem}.Modelfile")
    if options.ollama:
        print(f"{export.to_ollama(path, options.ollama)}: python -m helpers chat --llm ollama:{options.ollama}")
    return 0


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
