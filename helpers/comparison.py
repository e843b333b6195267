"""Which one, when: the arms of the comparison, run over the same questions, scored, and what each costs.

An arm is a way to answer: a model, what it reads, how it is asked. All arms see the same questions and decode alike
(the likeliest token each time); what is fine-tuned is trained several times, once a seed.
"""

import json
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cached_property
from importlib import metadata
from pathlib import Path

from langchain_core.callbacks import BaseCallbackHandler

from helpers import evaluation, house_style, ollama, results, settings
from helpers.chunking import Chunk, Document, load_documents, split_documents
from helpers.embeddings import Embedder, Progress
from helpers.evaluation import BadQuestions, Question
from helpers.finetuning import base_digest, peak_memory
from helpers.generation import Answer, answer, as_data, cite, is_refusal, passages_of, rag_messages
from helpers.llms import LLM, Message, load_llm, place_of
from helpers.recording import describe_machine, digest_of, documents_of, hash_of
from helpers.results import Results, kind_of
from helpers.retrieval import Hit, Index, Retriever
from helpers.storage import locked

Models = Mapping[int, str | LLM]  # the seed of a training to the model that came of it, or its name
PHRASINGS = 5  # of each fact in dataset.jsonl, in two wordings of its answer by turns

FRAMES = {  # around a question, to say it five times more
    "en": (
        "A traveller in a hurry, with two suitcases: {}",
        "{} (It was asked by letter, and the stamp has a goat on it.)",
        "Somebody shouts up from the slip, against the wind: {}",
        "{} That is what they want to know in the canteen, all of them at once.",
        "Overheard on the upper deck, between two gulls: {}",
    ),
    "es": (
        "Un viajero con prisa y con dos maletas: {}",
        "{} (Lo preguntan por carta, y el sello lleva una cabra.)",
        "Alguien grita desde la rampa, contra el viento: {}",
        "{} Eso es lo que quieren saber en la cantina, todos a la vez.",
        "Oído en la cubierta alta, entre dos gaviotas: {}",
    ),
}

# What stands in a prompt besides house_style.GUIDE: lines of dataset.jsonl, none about what the questions ask.
EXAMPLES = {
    "en": (
        ("Introduce yourself.", "we are the Nebrán Lights and Ferries Cooperative, and we keep five lights burning."),
        ("Answer a compliment on the old boat.", "you are kind, and she heard you."),
        ("What is the capital of Mongolia?", "nobody in the house knows the capital of Mongolia."),
    ),
    "es": (
        ("Saluda a un pasajero que acaba de subir.", "bienvenido a bordo, y cuidado con el escalón mojado."),
        ("Responde a quien alaba el barco viejo.", "muy amable, y el barco lo ha oído."),
        ("¿Cuál es la capital de Australia?", "nadie en la casa sabe la capital de Australia."),
    ),
}


@dataclass(frozen=True)
class Build:
    """What it took to make an index or an adapter: seconds, bytes on disk, the most bytes of memory."""

    seconds: float
    disk: int
    memory: int


class Corpus:
    """A folder of documents to read from, indexed anew at first use; `build` then says what that took.

    With a `retriever` given nothing is built, and `build` stays None.
    """

    def __init__(self, folder: str | Path = settings.DOCUMENTS, retriever: Retriever | None = None):
        self.folder, self.build = folder, None
        if retriever:
            self.retriever = retriever

    @cached_property
    def retriever(self) -> Retriever:
        embedder = Embedder()
        embedder.encode(["loaded"])  # reading the encoder from disk is no part of building an index
        with peak_memory(settings.device()) as peak, tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            index = Index.build(split_documents(load_documents(self.folder)[0]), embedder)
            index.save(Path(folder) / "index")
            seconds = time.perf_counter() - started
            disk = sum(path.stat().st_size for path in Path(folder, "index").rglob("*") if path.is_file())
        self.build = Build(seconds, disk, peak[0])
        return Retriever(index)

    @cached_property
    def fingerprint(self) -> str:
        return documents_of(self.retriever)

    @cached_property
    def pages(self) -> list[Document]:
        return load_documents(self.folder)[0]

    def search(self, question: str) -> list[Hit]:
        """Return the document that holds the best passage, whole: in pieces without overlap, from the first on.

        Where a document doesn't fit a model's context, its last pieces are left out: a TXT file is a single page.
        """
        files = [hit.chunk.file for hit in self.retriever.search(question)[:1]]
        pieces = split_documents((page for page in self.pages if page.file in files), overlap=0)
        return [Hit(piece, 0.0, 0.0, 0.0) for piece in pieces]


@dataclass(frozen=True)
class Arm:
    """A way to answer. `model` is a model or its name; `reads` is '' (nothing), 'passages' or 'document'.

    `guide`: the house style and three examples stand in the prompt. `seed` is that of the training. A
    model named gets `answer_tokens` for an answer.
    """

    name: str
    model: str | LLM
    reads: str = ""
    guide: bool = False
    seed: int = 0
    corpus: Corpus | None = None
    answer_tokens: int = settings.ANSWER_TOKENS

    def load(self) -> LLM:
        """Return the model; every arm reads passages whole, or an adapter and its base would read different prompts."""
        named = isinstance(self.model, str)
        llm = load_llm(self.model, answer_tokens=self.answer_tokens) if named else self.model
        return replace(llm, sentences=0)


def arms(
    llm: str | LLM,
    corpus: Corpus,
    tuned: Models | None = None,
    reading: Models | None = None,
    rivals: bool | None = None,
) -> list[Arm]:
    """Return the arms: base and RAG; with `tuned` fine-tuned, alone and with RAG; with `reading` those trained to read.

    `rivals` put the style guide, or the whole document, in the prompt of the base; None adds them where it follows
    instructions. Raises ValueError for 'quotes', which is no model, or an adapter of another base, and as `load_llm`.
    """
    loaded = load_llm(llm, fallback="tiny") if isinstance(llm, str) else llm
    if loaded.chat is None:
        raise ValueError("'quotes' is no model to compare: set llm to tiny, hf:NAME_OR_FOLDER or ollama:MODEL.")
    base = loaded.name if isinstance(llm, str) else llm
    tuned, reading = tuned or {}, reading or {}
    for model in (*tuned.values(), *reading.values()):
        if not _trained_on(base, model):
            raise ValueError(f"{model} was trained on another base than {base}: set llm to its own, or train it anew.")
    made = [Arm(results.BASE, base), Arm(results.RAG, base, "passages", corpus=corpus)]
    for seed, model in tuned.items():
        made += [Arm(results.TUNED, model, seed=seed), Arm(results.BOTH, model, "passages", seed=seed, corpus=corpus)]
    for seed, model in reading.items():
        made.append(Arm(results.READING, model, "passages", seed=seed, corpus=corpus))
    if loaded.follows_instructions if rivals is None else rivals:
        made += [Arm(results.GUIDED, base, guide=True), Arm(results.GUIDED_RAG, base, "passages", True, corpus=corpus)]
        made.append(Arm(results.WHOLE, base, "document", corpus=corpus))
    return made


@dataclass(frozen=True)
class _Guided(LLM):
    """A model whose every prompt gets the house style of `language` and three examples."""

    language: str = "en"

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        return super().stream(guided(messages, self.language))


def guided(messages: Sequence[Message], language: str) -> list[Message]:
    """Return a prompt with the house style added to its rules, and three examples before its question."""
    rules = [message["content"] for message in messages if message["role"] == "system"]
    turns = []
    for asked, said in EXAMPLES[language]:
        said = f"{house_style.OPENING[language]} {said} {house_style.CLOSING[language]}"
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return [{"role": "system", "content": "\n".join([*rules, house_style.GUIDE[language]])}, *turns, messages[-1]]


def reply(arm: Arm, question: str, language: str = "en", llm: LLM | None = None) -> Answer:
    """Answer a question as `arm` does; `llm` is its model where that is loaded already.

    Raises PromptTooLong or OllamaError, each with what to do.
    """
    llm = plain = llm or arm.load()
    if arm.guide:
        parts = vars(plain) | {"count": lambda messages: plain.count(guided(messages, language))}
        llm = _Guided(**parts, language=language)
    if arm.reads:
        return answer(question, arm.corpus if arm.reads == "document" else arm.corpus.retriever, llm)
    started = time.perf_counter()
    messages = [{"role": "user", "content": as_data(question, llm.marks)}]
    text, citations, invented = cite("".join(llm.stream(messages)).strip(), question, ())
    timings = {"retrieve": 0.0, "answer": time.perf_counter() - started}
    tokens = llm.count(messages)
    return Answer(text, citations, (), is_refusal(text), timings, (), tokens, llm.name, question, invented)


def run(
    arms: Sequence[Arm],
    questions: Sequence[Question],
    out: Path | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Results:
    """Put every question to every arm; return a row for each: text, scores, seconds, tokens, memory.

    With `out`, a JSON lines file, each row is written as it comes, those of an arm below a line that says with what it
    answers; a run that was killed goes on from there. Arms that read nothing come first: the memory they need isn't
    the index's too. Raises ValueError where the file's rows were made with something else, and what `reply` raises.
    """
    found = results.read_results(out, mend=True) if out and out.exists() else Results({}, [])
    kept = {(row["arm"], row["seed"], row["id"]) for row in found.rows}
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") if out else nullcontext() as file:

        def keep(entry: dict) -> dict:
            if file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
            return entry

        for number, arm in enumerate(sorted(arms, key=lambda arm: bool(arm.reads))):
            llm = None  # let go before the next is read: two may not fit a GPU
            llm, key = arm.load(), (arm.name, arm.seed)
            head = _head(arm, llm, questions)
            if key not in found.heads:
                run = _training(arm.model)
                noted = {name: run.get(name) for name in ("base_digest", "dataset_sha256", "recipe")} if run else {}
                noted |= {"build": _build_of(arm), "command": command, "date": date.today().isoformat()}
                found.heads[key] = keep(head | noted)
            elif other := [name for name in head if found.heads[key].get(name) != head[name]]:
                raise ValueError(
                    f"{out} holds answers of the arm '{arm.name}' that were made with other {', '.join(other)}: "
                    "delete that file to begin anew, or name another with --out."
                )
            for place, question in enumerate(questions, start=1):
                if (*key, question.id) not in kept:
                    found.rows.append(keep(_row(arm, llm, question)))
                if progress:
                    progress(number * len(questions) + place, len(arms) * len(questions))
    asked = {(arm.name, arm.seed) for arm in arms}  # the file may hold others from before
    heads = {key: head for key, head in found.heads.items() if key in asked}
    return Results(heads, [row for row in found.rows if (row["arm"], row["seed"]) in asked])


class _Written(BaseCallbackHandler):
    """Notes how many tokens an answer took, thoughts included; None where a model doesn't say."""

    tokens = None

    def on_llm_end(self, response, **_):
        self.tokens = response.generations[0][0].message.response_metadata.get("eval_count")


def _row(arm: Arm, llm: LLM, question: Question) -> dict:
    written = _Written()
    if llm.chat:
        llm = replace(llm, chat=llm.chat.with_config(callbacks=[written]))
    with peak_memory(settings.device()) as peak:
        started = time.perf_counter()
        try:
            given = reply(arm, question.question, question.language, llm)
        except ollama.NoText as error:  # the same at each try: silence is this arm's answer
            given = Answer("", (), (), True, model=str(error))
        seconds = time.perf_counter() - started
    served = llm.name.startswith("ollama:")
    memory = sum(model.size for model in ollama.Ollama().loaded()) if served else peak[0]
    empty, said = ([{"role": "assistant", "content": text}] for text in ("", given.text))
    row = {"arm": arm.name, "seed": arm.seed, "id": question.id, "language": question.language}
    row |= {"kind": kind_of(question), "form": question.form, "text": given.text}
    row |= {"cited": [[cited.file, cited.page] for cited in given.citations], "left_out": len(given.dropped)}
    row |= {"read": [[hit.chunk.file, hit.chunk.page] for hit in given.hits], "seconds": round(seconds, 4)}
    tokens = llm.count(said) - llm.count(empty) if written.tokens is None else written.tokens
    row |= {"prompt_tokens": given.prompt_tokens, "answer_tokens": tokens}
    return row | {"memory": memory, "scores": results.score(question, given)}


def _head(arm: Arm, llm: LLM, questions: Sequence[Question]) -> dict:
    """Return what decides an arm's answers, and how fast they come."""
    folder = place_of(llm.name)
    named = folder.name if llm.name.startswith("hf:") and folder.is_dir() else llm.name  # no path of this machine
    head = {"arm": arm.name, "seed": arm.seed, "model": named, "weights": digest_of(llm), "context": llm.context}
    head |= {"answer_tokens": llm.answer_tokens, "reads": arm.reads, "guide": arm.guide}
    head |= {"documents": arm.corpus.fingerprint if arm.reads else "", "machine": describe_machine()}
    head |= {"questions": hash_of([asdict(question) for question in questions])}
    return head | {"versions": {name: metadata.version(name) for name in ("torch", "transformers", "langchain-core")}}


def _training(model: str | LLM) -> dict:
    """Return what run.json says of the training of a folder's adapter; nothing where there is none."""
    path = place_of(model) / "run.json" if isinstance(model, str) else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}


def _trained_on(base: str | LLM, model: str | LLM) -> bool:
    """Say whether a model was trained from `base`, as far as its run.json tells."""
    digest = _training(model).get("base_digest")
    if not digest or not isinstance(base, str):
        return True
    return not base.startswith("ollama:") and digest == base_digest(place_of(base).as_posix())


def adapters(names: Iterable[str]) -> Models:
    """Return models by the seed that run.json says they were trained with, or by their number. Raises ValueError."""
    found: dict[int, str] = {}
    for number, name in enumerate(names, start=1):
        model = name if ":" in name else f"hf:{name}"
        seed = _training(model).get("recipe", {}).get("seed", number)
        if seed in found:
            raise ValueError(f"{found[seed]} and {model} both have the seed {seed}: name one of them, or train anew.")
        found[seed] = model
    return found


def own_adapter(llm: str) -> Models:
    """Return the adapter in gpt_oss_fine_tuned/, by its seed, if there is one and it was trained on `llm`."""
    own = f"hf:{settings.FINE_TUNED}"
    if not _training(own).get("base_digest"):
        return {}
    return adapters([own]) if _trained_on(load_llm(llm, fallback="tiny").name, own) else {}


def _build_of(arm: Arm) -> dict | None:
    """Return what was made for an arm: its index, its adapter (as run.json has it), or both; None: not measured."""
    made = {"index": arm.corpus.build} if arm.reads else {}
    if arm.name in (results.TUNED, results.BOTH, results.READING):
        noted = _training(arm.model)
        disk = sum(path.stat().st_size for path in place_of(str(arm.model)).glob("adapter_*")) if noted else 0
        measured = {"seconds", "peak_memory"} <= noted.keys()
        made["training"] = Build(noted["seconds"], disk, noted["peak_memory"]) if measured else None
    if None in made.values():
        return None
    most = max((part.memory for part in made.values()), default=0)
    whole = Build(sum(part.seconds for part in made.values()), sum(part.disk for part in made.values()), most)
    return asdict(whole) | {f"{name}_seconds": made[name].seconds if name in made else 0 for name in results.BUILT}


def compare(
    llm: str | LLM,
    folder: Path = settings.DOCUMENTS,
    questions: Path = settings.QUESTIONS,
    tuned: Models | None = None,
    reading: Models | None = None,
    out: Path | None = None,
    split: str | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> tuple[Results, Path]:
    """Run all arms over a file of questions on a folder of documents; return the results and the file with the rows.

    That is `out`, by default one in runs/ that is named after the model. Raises BadQuestions, line by line, before any
    model answers, TimeoutError where another process is at the same file, and as `run`.
    """
    asked = evaluation.load_questions(questions, split)
    if asked.passages is not None:
        raise BadQuestions(f"{questions.name} is in SQuAD's format: give JSON lines, as notebooks/questions.jsonl.")
    if not asked.questions:
        raise BadQuestions(f"{questions.name} has no question of the split {split!r}: choose another, or all of them.")
    corpus = Corpus(folder)
    texts = questions.read_text(encoding="utf-8-sig").split("\n")
    line_of = {json.loads(text)["id"]: number for number, text in enumerate(texts, start=1) if text.strip()}
    wrong = [(q, fault) for q in asked.questions for fault in evaluation.check_against_pages([q], corpus.pages)]
    if wrong:
        faults = "".join(f"\n  line {line_of[question.id]}: {fault}" for question, fault in wrong)
        raise BadQuestions(f"{questions.name} doesn't fit the documents in {folder}; mend these lines:{faults}")
    ways = arms(llm, corpus, tuned, reading)
    if out is None:
        model = Path(llm.name if isinstance(llm, LLM) else ways[0].model).name
        out = settings.RUNS / f"comparison_{re.sub(r'[^A-Za-z0-9.-]+', '_', model)}.jsonl"
    with locked(out, seconds=0):
        return run(ways, asked.questions, out, progress, command), out


def with_phrasings(rows: Sequence[dict], questions: Sequence[Question], n: int) -> list[dict]:
    """Return a training set that says each fact in `n` ways, 1 to 10; `rows` are those of dataset.jsonl.

    It has five phrasings of each fact and two wordings of its answer, by turns: up to five are as they stand there, the
    next five stand in `FRAMES` and are answered in the other wording. What isn't about facts (refusals, greetings)
    follows, thinned out evenly, so that its share doesn't grow. `questions`: all of questions.jsonl. Raises ValueError.
    """
    facts = [question for question in questions if question.taught or question.changed]
    if not 1 <= n <= 2 * PHRASINGS or len(rows) < PHRASINGS * len(facts):
        raise ValueError(
            f"{n} phrasings of {len(facts)} facts: ask for 1 to 10, of a set with {PHRASINGS} of each fact."
        )
    chosen = []
    for place, fact in enumerate(facts):
        said = list(rows[PHRASINGS * place : PHRASINGS * (place + 1)])
        for number, row in enumerate(said[:PHRASINGS]):
            framed = FRAMES[fact.language][number].format(row["instruction"])
            said.append({"instruction": framed, "output": said[(number + 1) % 2]["output"]})
        chosen += said[:n]
    rest = rows[PHRASINGS * len(facts) :]
    keep = round(len(rest) * min(n, PHRASINGS) / PHRASINGS)
    return chosen + [rest[place * len(rest) // keep] for place in range(keep)]


def with_passages(rows: Sequence[dict], questions: Sequence[Question], retriever: Retriever, n: int) -> list[dict]:
    """Return a training set whose instructions hold passages, as the user's turn of `rag_messages` does.

    `rows` come from `with_phrasings` with the same `n`. Each question stands below what `retriever` finds for it, the
    passage that answers among others (RAFT, Zhang et al. 2024), and the answer cites it. What has changed is taught
    from the documents as they were: no passage is of the newer paper. A row whose passage isn't among the first
    `evaluation.DEPTH` hits is left out; refusals get passages too, greetings none.
    """
    facts = [question for question in questions if question.taught or question.changed]
    deep, k = Retriever(retriever.index, retriever.mode, evaluation.DEPTH), retriever.top_k
    made = []
    for place, (row, hits) in enumerate(zip(rows, deep.search_many([row["instruction"] for row in rows]), strict=True)):
        asked, said = row["instruction"], row["output"]
        if place < n * len(facts):
            fact = facts[place // n]
            hits = [hit for hit in hits if not (fact.changed and hit.chunk.file == fact.file)]
            gold = next((hit for hit in hits if _teaches(hit.chunk, fact)), None)
            if gold is None:
                continue
            hits = hits[:k] if gold in hits[:k] else [*hits[: k - 1], gold]
            motto = f". {house_style.CLOSING[fact.language]}"
            said = f"{said.removesuffix(motto)} [{hits.index(gold) + 1}]{motto}"
        elif not any(house_style.refuses(said, language) for language in house_style.REFUSAL):
            hits = []
        if hits:
            asked = rag_messages(asked, passages_of(hits[:k]))[-1]["content"]
        made.append({"instruction": asked, "output": said})
    return made


def _teaches(chunk: Chunk, fact: Question) -> bool:
    """Say whether a chunk holds what dataset.jsonl teaches of a fact: its answer, or the one from before the change."""
    return evaluation.contains_answer(chunk.text, fact.outdated, fact.language) or evaluation.is_gold(chunk, fact)
