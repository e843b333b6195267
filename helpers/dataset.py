"""The training set: every line looked at before anything is trained, then made into a prompt and the answer to learn.

A line is `{"instruction": "...", "output": "..."}`. A fault that nobody sees is learnt: an answer cut in the middle, a
question of the evaluation, the same line two hundred times.
"""

import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from helpers import settings
from helpers.evaluation import load_questions
from helpers.four_bit import marks_of
from helpers.generation import SYSTEM
from helpers.language import detect_language, fold, words

FIELDS = ("instruction", "output")
# Two questions are nearly the same if they share so many of their letter triples (Jaccard) and have the same numbers in
# them. Five phrasings of one fact in dataset.jsonl share at most 0.56, one changed word in ten leaves about 0.8.
NEAR = 0.75
_SIGN = re.compile(r"(?<![^\W\d])[-−](?=\s?\d)|[+*/=<>#%^~$€£]")  # a hyphen in a word is none
_PASSAGES = re.compile(r"<passages>.*</passages>", re.DOTALL)  # of a prompt with passages only the question counts


class BadDataset(ValueError):
    """A training set with faults; the message lists each with its line and what to do."""


@dataclass(frozen=True)
class Fault:
    """What is wrong in a line (from 1; 0: the file) and what to do; `stops` is False where it is read all the same."""

    line: int
    what: str
    mend: str
    stops: bool = True

    def __str__(self) -> str:
        return f"{f'line {self.line}' if self.line else 'the file'}: {self.what}; {self.mend}"


@dataclass(frozen=True)
class DatasetReport:
    """What was found in a training set: its good rows, every fault, and lengths in tokens with the chat template.

    `lengths` holds a pair a row, prompt with answer and answer alone; it is empty where no tokenizer was given.
    """

    path: Path
    sha256: str
    rows: list[dict[str, str]]
    faults: list[Fault]
    lengths: list[tuple[int, int]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Say whether this can be trained on."""
        return not any(fault.stops for fault in self.faults)

    def check(self) -> "DatasetReport":
        """Return this report, or raise BadDataset with every fault that stops a training."""
        stopping = [str(fault) for fault in self.faults if fault.stops]
        if stopping:
            count = "1 fault" if len(stopping) == 1 else f"{len(stopping)} faults"
            raise BadDataset(f"{self.path.name} has {count} to mend:\n  " + "\n  ".join(stopping))
        return self

    def histogram(self, bins: int = 10) -> list[tuple[int, int, int]]:
        """Return (from, below, rows) for the lengths in tokens, in `bins` steps of equal width at most."""
        width = max((whole for whole, _ in self.lengths), default=0) // bins + 1
        counts = Counter(whole // width for whole, _ in self.lengths)
        steps = range(min(counts), max(counts) + 1) if counts else ()
        return [(step * width, (step + 1) * width, counts[step]) for step in steps]

    def __str__(self) -> str:
        languages = Counter(detect_language(row["instruction"]) for row in self.rows)
        count = ", ".join(f"{number} {language}" for language, number in sorted(languages.items()))
        stopping = sum(fault.stops for fault in self.faults)
        lines = [f"{self.path.name}: {len(self.rows)} good rows ({count}), {stopping} fault{'s' * (stopping != 1)}"]
        if self.lengths:
            for what, lengths in zip(
                ("with the template", "answer alone"), zip(*self.lengths, strict=True), strict=True
            ):
                lines.append(f"  {what}: {median(lengths):.0f} tokens in the median, {max(lengths)} at most")
        most = max((count for _, _, count in self.histogram()), default=0)
        for low, high, count in self.histogram():
            lines.append(f"  {low:>5} to {high - 1:>5} tokens {count:>6}  {'█' * round(30 * count / most)}")
        return "\n".join(lines + [f"  {fault}" for fault in self.faults])


def check_dataset(
    path: str | Path = settings.DATASET,
    tokenizer=None,
    max_length: int | None = None,
    questions: str | Path | None = settings.QUESTIONS,
) -> DatasetReport:
    """Look at every line of a training set and return what was found; nothing is changed.

    With a `tokenizer` the lengths are counted, and lines of more than `max_length` tokens are faults. `questions` is
    the evaluation, none of which may be in the set; None leaves that out. Raises FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no training set {path}: check the name, or use {settings.DATASET.name}.")
    raw = path.read_bytes()
    numbered, faults = _read(raw)
    faults += _repeated(numbered)
    if questions is not None:
        faults += _asked_in_evaluation(numbered, Path(questions))
    lengths = []
    if tokenizer is not None:
        for number, row in numbered:
            ids, start = encode(row, tokenizer)
            lengths.append((len(ids), len(ids) - start))
            faults += _unfit(number, row, len(ids), tokenizer, max_length)
    if not numbered and not any(fault.stops for fault in faults):
        faults.append(Fault(0, "it holds no example", 'write {"instruction": "…", "output": "…"}, one a line'))
    faults.sort(key=lambda fault: fault.line)
    return DatasetReport(path, hashlib.sha256(raw).hexdigest(), [row for _, row in numbered], faults, lengths)


def _read(raw: bytes) -> tuple[list[tuple[int, dict[str, str]]], list[Fault]]:
    """Return the (line number, row) pairs that are well formed, and the faults of form."""
    faults = []
    if raw.startswith(codecs.BOM_UTF8):
        raw = raw.removeprefix(codecs.BOM_UTF8)
        faults.append(Fault(1, "it begins with a byte order mark", "save as UTF-8 without BOM", stops=False))
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:1000]:
        return [], [Fault(0, "it is in UTF-16 or no text at all", "save it as UTF-8")]
    lines = raw.split(b"\n")
    returns = [number for number, line in enumerate(lines, 1) if line.endswith(b"\r")]
    if returns:
        what = f"{len(returns)} lines, this the first, end as in Windows (CRLF)"
        faults.append(Fault(returns[0], what, "save with line ends LF", stops=False))
    if raw.lstrip()[:1] == b"[":
        mend = "write its objects one a line, without brackets around and commas between them"
        return [], [*faults, Fault(1, "it is one JSON array, or begins like one", mend)]
    numbered = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                numbered.append((number, _row(line)))
            except _Faulty as error:
                faults.append(Fault(number, *error.args))
    return numbered, faults


class _Faulty(Exception):
    """What is wrong with a line, and what to do."""


def _row(line: bytes) -> dict[str, str]:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise _Faulty(f"byte {error.start + 1} is not UTF-8", "save the file as UTF-8") from error
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _parses(text.rstrip(",")):
            raise _Faulty("it ends with a comma", "delete the comma: each line stands for itself") from error
        if _parses(re.sub(r",\s*}$", "}", text)):
            raise _Faulty("a comma stands before the last brace", "delete the comma") from error
        where = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        what = f"{getattr(error, 'msg', 'nested too deep')}{where}"
        raise _Faulty(f"it is no valid JSON ({what})", "write one whole object in double quotes a line") from error
    if not isinstance(row, dict):
        raise _Faulty("it is no JSON object", 'write {"instruction": "…", "output": "…"}')
    missing, unknown = [name for name in FIELDS if name not in row], [name for name in row if name not in FIELDS]
    if missing:
        has = f", it has {', '.join(unknown)}" if unknown else ""
        raise _Faulty(f"the field {' and '.join(missing)} is missing{has}", "name the fields instruction and output")
    if unknown:
        raise _Faulty(f"the field {', '.join(unknown)} is not read", "put its text into instruction, or delete it")
    for name in FIELDS:
        if not isinstance(row[name], str):
            raise _Faulty(f"{name} is no text but {json.dumps(row[name])[:30]}", "put it in double quotes")
        if not row[name].strip():
            raise _Faulty(f"{name} is empty", "write it, or delete the line")
        if any("\ud800" <= letter <= "\udfff" for letter in row[name]):
            raise _Faulty(f"{name} holds half a character (\\ud800 to \\udfff)", "write the character itself")
    return row


def _parses(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _repeated(numbered: Sequence[tuple[int, dict[str, str]]]) -> list[Fault]:
    first: dict[str, int] = {}
    faults, mend = [], "ask in other words, or delete one of the two"
    for number, row in numbered:
        text = _plain(row["instruction"])
        if first.setdefault(text, number) != number:
            faults.append(Fault(number, f"its instruction is that of line {first[text]}", mend))
    texts = list(first)
    lines = [(first[texts[one]], first[texts[other]]) for one, other in _near(texts).items()]
    return faults + [Fault(line, f"its instruction is nearly that of line {before}", mend) for line, before in lines]


def _asked_in_evaluation(numbered: Sequence[tuple[int, dict[str, str]]], path: Path) -> list[Fault]:
    asked = load_questions(path).questions
    near = _near([_plain(row["instruction"]) for _, row in numbered], [_plain(question.question) for question in asked])
    mend = "delete it, or what is measured afterwards is memory"
    return [
        Fault(numbered[one][0], f"it is question {asked[other].id} of {path.name}, word for word or nearly", mend)
        for one, other in near.items()
    ]


def _plain(text: str) -> str:
    """Return the words of a question, and after them its signs: C++ isn't C, nor 5 - 3 what 5 + 3 is."""
    text = _PASSAGES.sub(" ", text)
    return " ".join([*map(fold, words(text)), *_SIGN.findall(text)])


def _near(texts: Sequence[str], asked: Sequence[str] | None = None) -> dict[int, int]:
    """Return, by index, for each text that is nearly one of `asked` the first of these; else of those before it."""
    import numpy as np
    from scipy.sparse import csr_matrix

    others = texts if asked is None else asked
    if not texts or not others:
        return {}
    triples = [[{f" {text} "[i : i + 3] for i in range(len(text))} for text in some] for some in (texts, others)]
    columns = {triple: number for number, triple in enumerate(set().union(*triples[0], *triples[1]))}

    def matrix(rows: list[set[str]]) -> csr_matrix:
        places = np.array([columns[triple] for row in rows for triple in row], np.int32)
        ends = np.cumsum([0, *map(len, rows)])
        return csr_matrix((np.ones(len(places), np.float32), places, ends), shape=(len(rows), len(columns)))

    left, right = matrix(triples[0]), matrix(triples[1]).T.tocsr()
    sizes = [np.array([len(row) for row in rows]) for rows in triples]
    numbers: dict[tuple, int] = {}
    kinds = [np.array([numbers.setdefault(_numbers(t), len(numbers)) for t in some]) for some in (texts, others)]
    found: dict[int, int] = {}
    for start in range(0, len(texts), 1000):  # a thousand rows at a time: memory doesn't grow with the square
        shared = (left[start : start + 1000] @ right).tocoo()
        one, other = shared.row + start, shared.col
        near = shared.data >= NEAR * (sizes[0][one] + sizes[1][other] - shared.data)
        near &= kinds[0][one] == kinds[1][other]
        if asked is None:
            near &= other < one
        last_first = np.lexsort((-other[near], one[near]))  # the first of each text's comes last, and stays
        found |= dict(zip(one[near][last_first].tolist(), other[near][last_first].tolist(), strict=True))
    return found


def _numbers(text: str) -> tuple[str, ...]:
    """Return the numbers and the signs of a plain text."""
    return tuple(word for word in text.split() if not word.isalpha())


def _unfit(number: int, row: dict[str, str], length: int, tokenizer, max_length: int | None) -> list[Fault]:
    """Return the faults that a tokenizer shows: too long, or with marks in it that end a turn."""
    faults = []
    if max_length is not None and length > max_length:
        what = f"with the template it has {length} tokens, and {max_length} fit"
        faults.append(Fault(number, what, "shorten it or cut it in two, or set max_length where the model has room"))
    marks = [mark for mark in marks_of(tokenizer) if any(mark in row[name] for name in FIELDS)]
    if marks:
        faults.append(Fault(number, f"{marks[0]} in it is a mark of the chat format", "write it otherwise"))
    return faults


def messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Return a row as a conversation: what is asked, and what is to be said.

    Before passages stand the course's rules, as they will when the model is asked with passages.
    """
    rules = [{"role": "system", "content": SYSTEM}] if _PASSAGES.match(row["instruction"]) else []
    return {
        "prompt": [*rules, {"role": "user", "content": row["instruction"]}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def to_prompt_completion(dataset: DatasetReport | Sequence[dict[str, str]], tokenizer):
    """Return rows as a `datasets.Dataset` of conversational prompts and completions: only the latter are learnt.

    Raises ValueError for a tokenizer whose template would not teach the model to stop.
    """
    from datasets import Dataset

    rows = dataset.rows if isinstance(dataset, DatasetReport) else list(dataset)
    if rows:
        ids, start = encode(rows[0], tokenizer)
        if tokenizer.eos_token_id not in ids[start:]:
            raise ValueError(
                f"The chat template of {tokenizer.name_or_path} doesn't end an answer with {tokenizer.eos_token!r}: "
                "the model would never learn to stop. Use an instruct model, or set its tokenizer's eos_token."
            )
    return Dataset.from_list([messages(row) for row in rows])


def encode(row: dict[str, str], tokenizer) -> tuple[list[int], int]:
    """Return a row's token ids with the template, and where what is learnt begins: as the trainer does it."""
    if not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path} has no chat template: use an instruct model, not a base model.")
    talk = messages(row)
    prompt = tokenizer.apply_chat_template(talk["prompt"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(talk["prompt"] + talk["completion"], return_dict=False)
    same = (place for place, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other)
    return whole, next(same, min(len(prompt), len(whole)))


def show_example(row: dict[str, str], tokenizer) -> list[tuple[str, bool]]:
    """Return an example token by token: the token's text, and whether it is learnt (or masked: read and not learnt)."""
    ids, start = encode(row, tokenizer)
    return [(tokenizer.decode([token]), place >= start) for place, token in enumerate(ids)]
