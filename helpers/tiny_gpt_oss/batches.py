"""Batches for training the embedded model: examples laid out as rows of one prefix and many branches.

Writing them takes longer than learning from them, so processes of their own write ahead. The same seed gives the same
batch, whoever writes it.
"""

import hashlib
import multiprocessing
import random
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from transformers import AutoTokenizer

from helpers.generation import rag_messages
from helpers.tiny_gpt_oss import packing, tokenizer
from helpers.tiny_gpt_oss.curriculum import Example, Shape, Turn, make_closed_book, make_example
from helpers.tiny_gpt_oss.prose import make_prose
from helpers.tiny_gpt_oss.scenes import make_scenes
from helpers.tiny_gpt_oss.worlds import FOLDER

TEXT_LOSS = 0.08  # share of the tokens outside answers that are learnt: drawn anew for each batch
ANSWER = 20  # tokens of an answer, at the most and on the average of a batch
CLOSED_BOOK = 0.05  # share of rows without passages
_MARK = "\x00"


def fingerprint(examples: int = 100) -> str:
    """Return a sha256 of the curriculum: of its files, and of the first examples that the code makes of them."""
    digest = hashlib.sha256()
    for path in sorted(path for path in FOLDER.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    shape = Shape((1, 3), (200, 1000), 4)
    for make in (make_example, make_scenes, make_prose):
        for number in range(examples):
            digest.update(repr(make(random.Random(number), ("en", "es")[number % 2], shape)).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Bucket:
    """Rows of one layout: the examples' shape, rows a batch, and lengths in tokens."""

    shape: Shape
    rows: int
    prefix: int
    branch: int = 40
    rules: bool = True  # whether the prompt starts with the course's rules
    prose: float = 0.0  # share of rows with whole passages of prose
    scenes: float = 0.0  # share of rows with passages that are put together from the thesaurus

    @property
    def most_learnt(self) -> int:
        """Return how many tokens of a batch can be learnt."""
        return self.rows * (ANSWER * self.shape.questions + int(1.5 * TEXT_LOSS * self.prefix))


@dataclass(frozen=True)
class Batch:
    """Token ids (rows, tokens), prefix padding (rows, prefix), and which tokens to predict the next of.

    `learnt` and `answers`: (rows, tokens), true for a token whose next is learnt, and where that is part of an answer.
    `pointed`: (rows, branches x branch), for a token of a branch the place in the prefix of what comes next, or -1.
    """

    ids: np.ndarray
    padding: np.ndarray
    learnt: np.ndarray
    answers: np.ndarray
    pointed: np.ndarray
    layout: packing.Layout

    def tensors(self, most: int) -> tuple[torch.Tensor, ...]:
        """Return what a step takes: ids, padding, pointed, and of the learnt tokens places, targets and weights.

        The last three have `most` entries; those to spare weigh nothing. The others' weights add up to 1.
        """
        flat, answers = self.learnt.ravel(), self.answers.ravel()
        # Answers first: where there is no room for all, tokens of the passages are left out.
        places = np.concatenate([np.flatnonzero(flat & answers), np.flatnonzero(flat & ~answers)])[:most]
        weights = np.zeros(most, np.float32)
        weights[: len(places)] = 1 / len(places)
        # Each a place of its own: on a GPU the gradients of one and the same are added up one after the other.
        places = np.concatenate([places, np.arange(most - len(places))])
        targets = np.roll(self.ids, -1, 1).ravel()[places]
        found = (self.ids, self.padding, self.pointed, places, targets, weights)
        return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in found)


class Row(NamedTuple):
    """An example and its prompt up to where the question stands, as text and as tokens."""

    prefix: str
    example: Example
    tokens: tokenizers.Encoding


class Packer:
    """Turns examples into rows; the same seed gives the same batch."""

    def __init__(self, tokenizer_, window: int):
        self.tokenizer, self.window = tokenizer_.backend_tokenizer, window
        self.pad, self.template = tokenizer_.pad_token_id, tokenizer_.apply_chat_template
        bare = self.template([{"role": "user", "content": _MARK}], add_generation_prompt=True, tokenize=False)
        self.bare, self.asked = bare.split(_MARK)

    def prefix(self, example: Example, closed_book: bool = False, rules: bool = True) -> str:
        """Return the prompt up to where the question stands."""
        if closed_book:
            return self.bare
        messages = rag_messages(_MARK, [(passage.place, passage.text) for passage in example.passages])
        return self.template(messages if rules else messages[1:], tokenize=False).split(_MARK)[0]

    def batch(self, bucket: Bucket, seed: str) -> Batch:
        """Return a batch of fresh examples."""
        rng = random.Random(seed)
        rows = self.rows(rng, bucket, CLOSED_BOOK)
        return self.pack(rows, bucket, np.random.default_rng(rng.getrandbits(60)))

    def rows(self, rng: random.Random, bucket: Bucket, closed_book: float = 0.0, held_out: bool = False) -> list[Row]:
        """Return fresh rows that fit, both languages alike, a share of them without passages.

        `held_out` takes prose that isn't trained on; worlds are new at each seed anyway.
        """
        rows = []
        while len(rows) < bucket.rows:
            language = rng.choice(("en", "es"))
            if rng.random() < closed_book:
                example = make_closed_book(rng, language, bucket.shape.questions)
                prefix = self.prefix(example, rng.random() < 0.7)
            else:
                roll = rng.random() if bucket.prose or bucket.scenes else 1.0
                if roll < bucket.prose:
                    example = make_prose(rng, language, bucket.shape, held_out)
                elif roll < bucket.prose + bucket.scenes:
                    example = make_scenes(rng, language, bucket.shape)
                else:
                    example = make_example(rng, language, bucket.shape)
                prefix = self.prefix(example, rules=bucket.rules)
            tokens = self.tokenizer.encode(prefix)
            if len(tokens) <= bucket.prefix:
                rows.append(Row(prefix, example, tokens))
        return rows

    def pack(self, rows: list[Row], bucket: Bucket, rng=None) -> Batch:
        """Lay out rows; a branch too long for the layout is left empty.

        `rng` draws the tokens of the passages that are learnt too; without it none are.
        """
        layout = packing.Layout(bucket.prefix, bucket.branch, bucket.shape.questions, self.window)
        ids = np.full((len(rows), layout.tokens), self.pad)
        padding = np.ones((len(rows), layout.prefix), bool)
        text, answers = np.zeros(ids.shape, bool), np.zeros(ids.shape, bool)
        pointed = np.full(ids.shape, -1)
        for row, (prefix, example, found) in enumerate(rows):
            start = layout.prefix - len(found)
            ids[row, start : layout.prefix] = found.ids
            padding[row, start:] = False
            text[row, start : layout.prefix - 1] = True
            asked = self.tokenizer.encode_batch([turn.question + self.asked for turn in example.turns])
            said = self.tokenizer.encode_batch([turn.answer + tokenizer.RETURN for turn in example.turns])
            for number, (question, answer) in enumerate(zip(asked, said, strict=True)):
                if len(question) + len(answer) > layout.branch:
                    continue
                first = layout.prefix + number * layout.branch
                middle, last = first + len(question), first + len(question) + len(answer)
                ids[row, first:last] = question.ids + answer.ids
                text[row, first : middle - 1] = True
                answers[row, middle - 1 : last - 1] = True
                for token, place in copied(prefix, example, example.turns[number], answer.offsets[:-1]):
                    at = found.char_to_token(place)
                    pointed[row, middle - 1 + token] = -1 if at is None else start + at
        learnt = answers if rng is None else answers | (text & (rng.random(ids.shape) < TEXT_LOSS))
        return Batch(ids, padding, learnt, answers, pointed[:, layout.prefix :], layout)


def copied(prefix: str, example: Example, turn: Turn, offsets) -> Iterator[tuple[int, int]]:
    """Yield (token of the answer, place in the prefix of its last letter) for what the answer takes from there.

    `offsets` are those of the answer's tokens. Of a value the first two: what follows is found by what it follows.
    """
    if not turn.number:
        return
    head = f"[{turn.number}] {example.passages[turn.number - 1].place}\n"
    header = prefix.index(head)
    value, begun = turn.answer.index(turn.value), 0
    for token, (_, end) in enumerate(offsets):
        if value <= end <= value + len(turn.value):
            begun += 1
            if begun <= 2:
                yield token, header + len(head) + turn.start + end - 1 - value
        elif turn.answer[end - 1].isdigit() and end > value + len(turn.value):
            yield token, header + end - 1 - turn.answer.rindex("[")


_packer: Packer | None = None  # of a process that writes batches


def _prepare(folder: Path, window: int) -> None:
    global _packer
    torch.set_num_threads(1)
    _packer = Packer(AutoTokenizer.from_pretrained(folder), window)


def _write(bucket: Bucket, seed: str) -> Batch:
    return _packer.batch(bucket, seed)


class Writers:
    """Processes that write batches ahead, with the tokenizer in `folder`; they end with the `with` block."""

    def __init__(self, folder: Path, window: int, processes: int):
        context = multiprocessing.get_context("spawn")  # a fork of a process that uses a GPU may hang
        self.pool = ProcessPoolExecutor(processes, context, _prepare, (folder, window))
        self.ahead = 4 * processes
        for _ in range(processes):  # they start at the first jobs, and take seconds to
            self.pool.submit(int)

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)

    def batches(self, jobs: Iterable[tuple[Bucket, str]]) -> Iterator[Batch]:
        """Yield the batch of each (bucket, seed), in order."""
        jobs = iter(jobs)
        coming = deque(self.pool.submit(_write, *job) for job in islice(jobs, self.ahead))
        while coming:
            yield coming.popleft().result()
            coming.extend(self.pool.submit(_write, *job) for job in islice(jobs, 1))
