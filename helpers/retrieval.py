"""Vectors to the passages that matter: an index on disk, and three ways to search it.

Notebook 03 builds every step of this by hand first.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from helpers import settings
from helpers.chunking import (
    Chunk,
    FileReport,
    check_sizes,
    chunk_id,
    find_files,
    is_document,
    load_file,
    printable,
    relative_name,
    split_documents,
)
from helpers.embeddings import Embedder, Progress
from helpers.language import detect_language, stems
from helpers.storage import checked_manifest, locked, put_in_place, refused, sha256_of, write_manifest

FORMAT = 1  # of the files on disk; one more whenever they change
# Of a larger index only the nearest windows take part in the fusion; a FAISS on a GPU returns no more than this.
CANDIDATES = 2048


@dataclass(frozen=True)
class Hit:
    """A chunk that was found; `dense` is its cosine to the question, `bm25` its BM25 score.

    `score` says by how many standard deviations it stands out from all chunks (see `fuse`).
    `windows` has for each window of the chunk its start and end in the chunk's text and its own cosine; it is empty
    where only words were searched. `excerpt` are the sentences that a model is given of the chunk; () for all of it.
    """

    chunk: Chunk
    score: float
    dense: float
    bm25: float
    windows: tuple[tuple[int, int, float], ...] = ()
    excerpt: tuple[str, ...] = ()


@dataclass
class Update:
    """What an update did to each file, by name; `report` has a row for each file that was read anew."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    report: list[FileReport] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


class Index:
    """The chunks of a folder, their vectors in FAISS and their words in BM25.

    Make one with `build`, `from_texts`, `load` or `open`. `vectors` holds a row a window; `owners[row]` is the
    position in `chunks` of the chunk that the window belongs to.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        vectors: np.ndarray,
        owners: np.ndarray,
        embedder: Embedder,
        files: Mapping[str, str] | None = None,
        sizes: tuple[int, int] = (settings.CHUNK_SIZE, settings.CHUNK_OVERLAP),
        bm25=None,
        problems: Mapping[str, str] | None = None,
    ):
        self.chunks = list(chunks)
        self.vectors = vectors
        self.owners = owners
        self.embedder = embedder
        self.files = dict(files or {})  # relative path -> SHA-256 of its bytes
        self.problems = dict(problems or {})  # relative path -> what was wrong with that file, and what to do
        self.chunk_size, self.overlap = sizes
        self.languages = _languages(self.chunks)
        self.faiss = _faiss_index(vectors)
        self.bm25 = bm25 or _bm25_index(self.chunks, self.languages)

    @classmethod
    def build(
        cls,
        chunks: Sequence[Chunk],
        embedder: Embedder | None = None,
        progress: Progress | None = None,
    ) -> "Index":
        """Embed `chunks` and index them. Raises ValueError if there are none."""
        if not chunks:
            raise ValueError("There is nothing to index: no document with text was read. See the report of the files.")
        embedder = embedder or Embedder()
        vectors, owners = embedder.encode_windows([chunk.text for chunk in chunks], progress)
        return cls(chunks, vectors, owners, embedder)

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        metadatas: Sequence[Mapping] | None = None,
        embedder: Embedder | None = None,
        progress: Progress | None = None,
    ) -> "Index":
        """Index `texts` as they are, each one chunk. A metadata may give its `file`, `page` and `page_label`."""
        if metadatas is not None and len(metadatas) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(metadatas)} metadatas: give one for each text, or none.")
        chunks = []
        for number, text in enumerate(texts):
            metadata = metadatas[number] if metadatas else {}
            file, page = str(metadata.get("file", f"text-{number}")), int(metadata.get("page", 1))
            label = str(metadata.get("page_label", ""))
            chunks.append(Chunk(text, file, page, 0, len(text), chunk_id(file, page, 0, text), label))
        return cls.build(chunks, embedder, progress)

    @classmethod
    def open(
        cls,
        documents: str | Path = settings.DOCUMENTS,
        embedder: Embedder | None = None,
        chunk_size: int = settings.CHUNK_SIZE,
        overlap: int = settings.CHUNK_OVERLAP,
        progress: Progress | None = None,
    ) -> tuple["Index", Update]:
        """Return the index of a folder of documents and what had to be done for it to be up to date.

        It is read from `runs/index/`, built if it isn't there, and updated if a file changed. Only new text is
        embedded. Raises as `find_files`, `check_sizes` and `build` do, and IndexRefused.
        """
        check_sizes(chunk_size, overlap)
        find_files(documents)  # a folder that isn't there is said before the model is loaded
        embedder = embedder or Embedder()
        folder = index_folder(documents, embedder, chunk_size, overlap)
        with locked(folder):
            if (folder / "manifest.json").exists():
                index = cls._read(folder, embedder)
            else:
                nothing = np.zeros((0, embedder.dimension), dtype=np.float32)
                index = cls([], nothing, np.zeros(0, dtype=np.int64), embedder, sizes=(chunk_size, overlap))
            update = index.update(documents, progress)
            if update:
                index._write(folder)
        return index, update

    def update(self, documents: str | Path, progress: Progress | None = None) -> Update:
        """Bring this index up to date with a folder; return what was added, changed, removed and kept.

        Files are compared by their bytes. Only files that are new or changed are read and embedded; a text that
        is unchanged, file or chunk, keeps its vectors. Raises ValueError if no text is left.
        """
        paths = {relative_name(path, documents): path for path in find_files(documents)}
        # Of what isn't read, a film say, the name tells all.
        digests = {name: sha256_of(path) if is_document(path) else "not read" for name, path in paths.items()}
        update = Update(
            added=[name for name in digests if name not in self.files],
            changed=[name for name in digests if name in self.files and self.files[name] != digests[name]],
            removed=[name for name in self.files if name not in digests],
            kept=[name for name in digests if self.files.get(name) == digests[name]],
        )
        if not update and self.chunks:
            return update
        pages = []
        for name in update.added + update.changed:
            read, row = load_file(paths[name], documents)
            pages += read
            update.report.append(row)
        kept = set(update.kept)
        fresh = split_documents(pages, self.chunk_size, self.overlap)
        chunks = [chunk for chunk in self.chunks if chunk.file in kept] + fresh
        chunks.sort(key=lambda chunk: (chunk.file, chunk.page, chunk.start))
        if not chunks:
            raise ValueError(_nothing_to_index(documents, update.report))
        vectors, owners = self._vectors_of(chunks, progress)
        problems = {name: problem for name, problem in self.problems.items() if name in kept}
        problems |= {row.file: str(row) for row in update.report if row.problem}
        sizes = self.chunk_size, self.overlap
        self.__init__(chunks, vectors, owners, self.embedder, digests, sizes, problems=problems)
        return update

    def _vectors_of(self, chunks: list[Chunk], progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the window vectors of `chunks` and their owners; only texts not in this index are embedded."""
        rows_of = defaultdict(list)
        for row, owner in enumerate(self.owners):
            rows_of[self.chunks[owner].text].append(self.vectors[row])
        # A text that stands in the index twice has its rows twice: one set is enough.
        counts = {text: len(self.embedder.windows(text)) for text in {c.text for c in chunks} & rows_of.keys()}
        known = {text: rows_of[text][:count] for text, count in counts.items()}
        missing = list(dict.fromkeys(chunk.text for chunk in chunks if chunk.text not in known))
        if missing:
            rows, owners = self.embedder.encode_windows(missing, progress)
            known |= {text: rows[owners == number] for number, text in enumerate(missing)}
        owners = [number for number, chunk in enumerate(chunks) for _ in known[chunk.text]]
        return np.concatenate([known[chunk.text] for chunk in chunks]), np.array(owners, dtype=np.int64)

    def save(self, folder: str | Path) -> None:
        """Write the index into `folder`: written aside, then renamed into place, one writer at a time."""
        with locked(Path(folder)):
            self._write(Path(folder))

    @classmethod
    def load(cls, folder: str | Path, embedder: Embedder | None = None) -> "Index":
        """Read an index that `save` wrote. Raises FileNotFoundError, or IndexRefused with what to do."""
        folder = Path(folder)
        with locked(folder):
            if not (folder / "manifest.json").exists():
                raise FileNotFoundError(f"There is no index in {printable(folder)}: build one with Index.build.")
            return cls._read(folder, embedder)

    def _write(self, folder: Path) -> None:
        import faiss

        with put_in_place(folder) as new:
            # FAISS opens no path with an accent on Windows, and names no full disk: Python writes its bytes.
            (new / "vectors.faiss").write_bytes(faiss.serialize_index(_flat(self.vectors)).tobytes())
            windows = np.bincount(self.owners, minlength=len(self.chunks))
            lines = (
                json.dumps(asdict(chunk) | {"windows": int(count)}, ensure_ascii=False)
                for chunk, count in zip(self.chunks, windows, strict=True)
            )
            (new / "chunks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            self.bm25.save(new / "bm25", show_progress=False, allow_pickle=False)
            made_with = {
                "model": self.embedder.name,
                "fingerprint": self.embedder.fingerprint,
                "window_tokens": self.embedder.window_tokens,
            }
            facts = {
                "embedding": made_with,
                "chunking": {"chunk_size": self.chunk_size, "overlap": self.overlap},
                "documents": self.files,
                "problems": self.problems,
            }
            write_manifest(new, FORMAT, facts)

    @classmethod
    def _read(cls, folder: Path, embedder: Embedder | None) -> "Index":
        manifest = checked_manifest(folder, FORMAT)
        made_with = manifest["embedding"]
        embedder = embedder or Embedder(made_with["model"], window_tokens=made_with["window_tokens"])
        if made_with["fingerprint"] != embedder.fingerprint:
            raise refused(folder, f"it was built with another model, {made_with['model']}, not {embedder.name}")
        if made_with["window_tokens"] != embedder.window_tokens:
            sizes = f"{made_with['window_tokens']} tokens, the given encoder's of {embedder.window_tokens}"
            raise refused(folder, f"its windows are of {sizes}")
        try:
            return cls._parse(folder, manifest, embedder)
        except (ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
            # Its hashes match, so it was written like this: by another program, or by somebody who means harm.
            raise refused(folder, f"a file in it can't be parsed ({error})") from error

    @classmethod
    def _parse(cls, folder: Path, manifest: Mapping, embedder: Embedder) -> "Index":
        import faiss
        from bm25s import BM25

        rows = [json.loads(line) for line in (folder / "chunks.jsonl").read_text(encoding="utf-8").split("\n") if line]
        owners = np.repeat(np.arange(len(rows)), [row.pop("windows") for row in rows])
        stored = faiss.deserialize_index(np.fromfile(folder / "vectors.faiss", dtype=np.uint8))
        if stored.ntotal != len(owners) or stored.d != embedder.dimension:
            raise ValueError(f"{stored.ntotal} vectors of {stored.d} numbers for {len(owners)} windows")
        return cls(
            [Chunk(**row) for row in rows],
            stored.reconstruct_n(0, stored.ntotal),
            owners,
            embedder,
            manifest["documents"],
            (manifest["chunking"]["chunk_size"], manifest["chunking"]["overlap"]),
            BM25.load(folder / "bm25", allow_pickle=False),
            manifest["problems"],
        )

    def question_language(self, question: str) -> str:
        """Return the language of a question; that of most chunks where the question doesn't tell."""
        return detect_language(question, default=max(set(self.languages), key=self.languages.count))

    def rarity(self, stem: str) -> float:
        """Return the inverse document frequency of a stem as BM25 has it: 0 for a word in every chunk."""
        column = self.bm25.vocab_dict.get(stem)
        bounds = self.bm25.scores["indptr"]
        holding = int(bounds[column + 1] - bounds[column]) if column is not None else 0
        return math.log(1 + (len(self.chunks) - holding + 0.5) / (holding + 0.5))

    def bm25_scores(self, question: str) -> np.ndarray:
        """Return the `(len(chunks),)` BM25 scores of a question."""
        language = self.question_language(question)
        # Each chunk was stemmed in its own language; a name can have another stem in the question's.
        tokens = dict.fromkeys(stem for lang in sorted({language, *self.languages}) for stem in stems(question, lang))
        known = [token for token in tokens if token in self.bm25.vocab_dict]
        if not known:
            return np.zeros(len(self.chunks), dtype=np.float32)
        return self.bm25.get_scores(known)


class Retriever:
    """Finds the `top_k` chunks of an index that match a question best.

    `mode` is 'dense' (by meaning: the cosine of the vectors), 'bm25' (by words) or 'hybrid' (both, see `fuse`).
    """

    def __init__(self, index: Index, mode: str = "hybrid", top_k: int = settings.TOP_K):
        if mode not in settings.MODES:
            raise ValueError(f"mode is {mode!r}: choose one of {', '.join(settings.MODES)}.")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}: it must be at least 1.")
        self.index, self.mode, self.top_k = index, mode, top_k

    def search(self, question: str) -> list[Hit]:
        """Return the best `top_k` hits for one question, best first; none for a question without a word."""
        return self.search_many([question])[0]

    def search_many(self, questions: Sequence[str]) -> list[list[Hit]]:
        """Return the hits of each question; the questions are embedded together."""
        if not questions:
            return []
        if self.mode == "bm25":
            return [self._hits(question, None) for question in questions]
        return list(map(self._hits, questions, self.index.embedder.encode(questions)))

    def as_langchain(self):
        """Return this retriever as a LangChain `BaseRetriever`, to compose with other LangChain parts."""
        from langchain_core.documents import Document as LangChainDocument
        from langchain_core.retrievers import BaseRetriever

        search = self.search

        class HelpersRetriever(BaseRetriever):
            def _get_relevant_documents(self, query, *, run_manager):
                return [
                    LangChainDocument(
                        page_content=hit.chunk.text,
                        metadata={"source": hit.chunk.file, "page": hit.chunk.page, "score": hit.score},
                    )
                    for hit in search(query)
                ]

        return HelpersRetriever()

    def _dense_scores(self, vector: np.ndarray) -> np.ndarray:
        """Return the `(len(chunks),)` cosines of the chunks to a question: each that of its best window."""
        index = self.index
        cosines, rows = index.faiss.search(vector[None], min(CANDIDATES, index.faiss.ntotal))
        # A chunk none of whose windows is among the candidates counts as the last of them.
        best = np.full(len(index.chunks), cosines[0, -1], dtype=np.float32)
        np.maximum.at(best, index.owners[rows[0]], cosines[0])
        return best

    def _hits(self, question: str, vector: np.ndarray | None) -> list[Hit]:
        index = self.index
        if not any(char.isalnum() for char in question):
            return []
        nothing = np.zeros(len(index.chunks), dtype=np.float32)
        dense = self._dense_scores(vector) if vector is not None else nothing
        bm25 = index.bm25_scores(question) if self.mode != "dense" else nothing
        weight = settings.DENSE_WEIGHT[index.question_language(question)]
        weight = {"dense": 1.0, "bm25": 0.0}.get(self.mode, weight)
        scores = fuse(dense, bm25, weight)
        # A stable sort on rounded scores: equal scores come in the order of the documents on every machine.
        order = np.argsort(-np.round(scores, 5), kind="stable")[: self.top_k]
        return [
            Hit(index.chunks[i], float(scores[i]), float(dense[i]), float(bm25[i]), self._windows(i, vector))
            for i in order
        ]

    def _windows(self, position: int, vector: np.ndarray | None) -> tuple[tuple[int, int, float], ...]:
        if vector is None:
            return ()
        spans = self.index.embedder.windows(self.index.chunks[position].text)
        cosines = self.index.vectors[self.index.owners == position] @ vector
        return tuple((start, end, float(cosine)) for (start, end), cosine in zip(spans, cosines, strict=True))


def index_folder(documents: str | Path, embedder: Embedder, chunk_size: int, overlap: int) -> Path:
    """Return the folder below `runs/index/` for this folder of documents and these settings."""
    key = [str(Path(documents).resolve()), embedder.name, embedder.fingerprint, embedder.dtype, embedder.window_tokens]
    key += [chunk_size, overlap, settings.WINDOW_OVERLAP, settings.BM25_K1, settings.BM25_B]
    return settings.INDEXES / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _languages(chunks: Sequence[Chunk]) -> list[str]:
    """Return the language of each chunk: that of the whole of its file, since a table alone tells little."""
    texts = defaultdict(list)
    for chunk in chunks:
        texts[chunk.file].append(chunk.text)
    of_file = {file: detect_language("\n".join(parts)) for file, parts in texts.items()}
    return [of_file[chunk.file] for chunk in chunks]


def fuse(dense: np.ndarray, bm25: np.ndarray, weight: float) -> np.ndarray:
    """Return the fused score of every chunk: the mean of its two z-scores, `weight` of it from the vectors.

    Scores are fused, not ranks: a rank forgets that the best passage was far ahead, or hardly.
    """
    return weight * _z_scores(dense) + (1 - weight) * _z_scores(bm25)


def _z_scores(scores: np.ndarray) -> np.ndarray:
    """Return each score's distance from the mean in standard deviations; zeros where all scores are equal."""
    spread = scores.std()
    return (scores - scores.mean()) / spread if spread > 1e-9 else np.zeros_like(scores)


def _flat(vectors: np.ndarray):
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])  # inner product: the cosine, as all rows have length one
    index.add(vectors)
    return index


def _faiss_index(vectors: np.ndarray):
    """Return the vectors as a FAISS index, on the GPUs where the installed FAISS can use them."""
    import faiss

    flat = _flat(vectors)
    on_gpu = getattr(faiss, "get_num_gpus", lambda: 0)() > 0 and hasattr(faiss, "index_cpu_to_all_gpus")
    return faiss.index_cpu_to_all_gpus(flat) if on_gpu and len(vectors) else flat


def _bm25_index(chunks: Sequence[Chunk], languages: Sequence[str]):
    from bm25s import BM25

    bm25 = BM25(k1=settings.BM25_K1, b=settings.BM25_B)
    # bm25s can't index an empty vocabulary; no question has the word "", so it never counts.
    words = [stems(chunk.text, language) or [""] for chunk, language in zip(chunks, languages, strict=True)]
    if words:
        bm25.index(words, show_progress=False)
    return bm25


def _nothing_to_index(documents: str | Path, report: Sequence[FileReport]) -> str:
    head = f"No text to index in {printable(documents)}: "
    if not report:
        return head + "it holds no PDF or TXT file. Put some in it."
    return head + "none of its files could be read.\n" + "\n".join(f"  {row}" for row in report)
