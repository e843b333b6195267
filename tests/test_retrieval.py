"""The index and the retriever: what is found, what is stored, what is refused, and what a kill leaves behind."""

import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers import settings
from helpers.chunking import Document, chunk_id, load_documents, split_documents
from helpers.retrieval import Index, Retriever, fuse, index_folder
from helpers.storage import IndexRefused, sha256_of

TEXTS = [
    "The lighthouse keeper feeds the goat at dawn, before the wind rises.",
    "Ferry tickets cost 14.50 nebrales and are sold on board by the purser.",
    "El faro se enciende al anochecer y se apaga cuando sale el sol.",
    "La sopa de la cantina lleva algas, patata y una cucharada de vinagre.",
    "Fog signals: two long blasts, and then a silence of forty seconds.",
]


@pytest.fixture(scope="module")
def small(embedder):
    return Index.from_texts(TEXTS, [{"file": f"{n}.txt", "page": n + 1} for n in range(len(TEXTS))], embedder)


class CountingEmbedder:
    """The embedder, with a list of every text that was embedded as a document or a question."""

    def __init__(self, embedder):
        self._embedder = embedder
        self.texts = []

    def __getattr__(self, name):
        return getattr(self._embedder, name)

    def encode_windows(self, texts, *arguments, **options):
        self.texts += list(texts)
        return self._embedder.encode_windows(texts, *arguments, **options)

    def encode(self, texts, *arguments, **options):
        self.texts += list(texts)
        return self._embedder.encode(texts, *arguments, **options)


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("question", "right"),
    [
        ("Who gives food to the goat?", 0),
        ("What is the price of a ferry ticket?", 1),
        ("¿Cuándo se apaga el faro?", 2),
        ("¿Qué ingredientes lleva la sopa?", 3),
    ],
)
@pytest.mark.parametrize("mode", settings.MODES)
def test_each_mode_finds_the_right_text(small, mode, question, right):
    hits = Retriever(small, mode, top_k=3).search(question)
    assert hits[0].chunk.file == f"{right}.txt"
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len(hits) == 3


def test_search_many_gives_what_search_gives(small):
    retriever = Retriever(small)
    questions = ["Who feeds the goat?", "¿Qué lleva la sopa?", "fog"]
    for question, many in zip(questions, retriever.search_many(questions), strict=True):
        one = retriever.search(question)
        assert [hit.chunk.id for hit in one] == [hit.chunk.id for hit in many]
        assert np.allclose([hit.score for hit in one], [hit.score for hit in many], atol=1e-4)
    assert retriever.search_many([]) == []


def test_hybrid_is_the_weighted_mean_of_z_scores(small):
    question = "How long is the silence of the fog signal?"
    by_mode = {mode: Retriever(small, mode, top_k=5).search(question) for mode in settings.MODES}
    order = [chunk.id for chunk in small.chunks]
    dense = {hit.chunk.id: hit.dense for hit in by_mode["dense"]}
    bm25 = {hit.chunk.id: hit.bm25 for hit in by_mode["bm25"]}

    def z(values):
        values = np.array(values)
        return (values - values.mean()) / values.std()

    weight = settings.DENSE_WEIGHT["en"]
    by_hand = weight * z([dense[i] for i in order]) + (1 - weight) * z([bm25[i] for i in order])
    hybrid = {hit.chunk.id: hit.score for hit in by_mode["hybrid"]}
    assert np.allclose(by_hand, [hybrid[i] for i in order], atol=1e-4)


def test_fuse_copes_with_scores_that_are_all_equal():
    assert np.allclose(fuse(np.ones(3), np.zeros(3), 0.5), 0)


def test_a_window_counts_as_its_chunk(embedder):
    filler = "The weather was grey and nobody said much about it. " * 15
    index = Index.from_texts([filler + "Almirante the goat ate the logbook.", filler], None, embedder)
    assert len(index.vectors) > len(index.chunks) == 2
    hit = Retriever(index, "dense", 1).search("Which animal ate the logbook?")[0]
    assert hit.chunk.text.endswith("logbook.")
    assert hit.dense == pytest.approx(max(cosine for *_, cosine in hit.windows), abs=1e-4)
    assert hit.windows[0][0] == 0 and hit.windows[-1][1] == len(hit.chunk.text)


def test_faiss_finds_what_numpy_finds(small, embedder):
    vector = embedder.encode_query("keeper of the light")
    by_hand = small.vectors @ vector
    hits = Retriever(small, "dense", top_k=5).search("keeper of the light")
    assert [hit.chunk.file for hit in hits] == [f"{i}.txt" for i in np.argsort(-by_hand)]


def test_as_langchain_is_a_langchain_retriever(small):
    from langchain_core.retrievers import BaseRetriever

    retriever = Retriever(small).as_langchain()
    assert isinstance(retriever, BaseRetriever)
    documents = retriever.invoke("Who feeds the goat?")
    assert documents[0].page_content == TEXTS[0]
    assert documents[0].metadata["source"] == "0.txt" and documents[0].metadata["page"] == 1


@pytest.mark.parametrize("question", ["", "   ", "\x00\x07\x1b", "?!…", "\u202e"])
def test_a_question_without_a_word_finds_nothing(small, question):
    assert Retriever(small).search(question) == []


@pytest.mark.parametrize("characters", [10_000, pytest.param(100_000, marks=pytest.mark.stress)])
def test_a_very_long_question_is_searched(small, characters):
    hits = Retriever(small).search("the goat and the keeper " * (characters // 24 + 1))
    assert hits[0].chunk.file == "0.txt"


def test_wrong_arguments_are_named(small, embedder):
    with pytest.raises(ValueError, match="mode is 'fuzzy'"):
        Retriever(small, "fuzzy")
    with pytest.raises(ValueError, match="top_k is 0"):
        Retriever(small, top_k=0)
    with pytest.raises(ValueError, match="2 texts but 1 metadatas"):
        Index.from_texts(["a", "b"], [{}], embedder)
    with pytest.raises(ValueError, match="nothing to index"):
        Index.build([], embedder)


def test_build_takes_chunks(embedder):
    pages = [Document(" ".join(TEXTS), "all.txt", 1, "", "0")]
    chunks = split_documents(pages, 80, 10)
    index = Index.build(chunks, embedder)
    assert index.chunks == chunks
    assert index.chunks[0].id == chunk_id("all.txt", 1, 0, index.chunks[0].text)


def test_a_loaded_index_answers_as_the_saved_one(small, embedder, tmp_path):
    small.save(tmp_path / "saved")
    loaded = Index.load(tmp_path / "saved", embedder)
    assert loaded.chunks == small.chunks
    assert np.array_equal(loaded.vectors, small.vectors) and np.array_equal(loaded.owners, small.owners)
    for mode in settings.MODES:
        before, after = (Retriever(index, mode).search("Who feeds the goat?") for index in (small, loaded))
        assert [(h.chunk.id, round(h.score, 4)) for h in before] == [(h.chunk.id, round(h.score, 4)) for h in after]


def test_no_file_of_an_index_is_a_pickle(small, tmp_path):
    small.save(tmp_path / "saved")
    for path in (tmp_path / "saved").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not data.startswith(b"\x80"), path.name  # how every pickle since protocol 2 begins
            if path.suffix == ".npy":
                assert np.load(path, allow_pickle=False) is not None


@pytest.mark.parametrize("name", ["vectors.faiss", "chunks.jsonl", "manifest.json", "bm25/vocab.index.json"])
def test_a_changed_file_is_refused_with_what_to_do(small, embedder, tmp_path, name):
    small.save(tmp_path / "saved")
    path = tmp_path / "saved" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IndexRefused, match="Delete that folder"):
        Index.load(tmp_path / "saved", embedder)


def test_a_missing_file_is_refused(small, embedder, tmp_path):
    small.save(tmp_path / "saved")
    (tmp_path / "saved" / "chunks.jsonl").unlink()
    with pytest.raises(IndexRefused, match=r"chunks\.jsonl is missing"):
        Index.load(tmp_path / "saved", embedder)


class Planted:
    def __reduce__(self):
        return (os.system, ("touch pickle-was-run",))


@pytest.mark.parametrize("listed", [False, True], ids=["beside the files", "named in the manifest"])
def test_a_planted_pickle_is_never_run(small, embedder, tmp_path, monkeypatch, listed):
    monkeypatch.chdir(tmp_path)
    small.save(tmp_path / "saved")
    target = tmp_path / "saved" / ("bm25/data.csc.index.npy" if listed else "index.pkl")
    target.write_bytes(pickle.dumps(Planted()))
    if listed:
        manifest = json.loads((tmp_path / "saved" / "manifest.json").read_text())
        manifest["files"]["bm25/data.csc.index.npy"] = sha256_of(target)
        (tmp_path / "saved" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IndexRefused):
        Index.load(tmp_path / "saved", embedder)
    assert not (tmp_path / "pickle-was-run").exists()


def test_another_model_or_window_is_refused(small, embedder, tmp_path):
    small.save(tmp_path / "saved")
    other = CountingEmbedder(embedder)
    other.fingerprint = "another"
    with pytest.raises(IndexRefused, match="another model"):
        Index.load(tmp_path / "saved", other)
    longer = CountingEmbedder(embedder)
    longer.window_tokens = 254
    with pytest.raises(IndexRefused, match="windows are of 64 tokens"):
        Index.load(tmp_path / "saved", longer)


def test_another_format_is_refused(small, embedder, tmp_path):
    small.save(tmp_path / "saved")
    path = tmp_path / "saved" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(IndexRefused, match="format is 99"):
        Index.load(tmp_path / "saved", embedder)


def test_no_index_is_said(tmp_path, embedder):
    with pytest.raises(FileNotFoundError, match="There is no index"):
        Index.load(tmp_path / "nothing", embedder)


def test_open_embeds_nothing_when_nothing_changed(indexes, embedder, tmp_path):
    folder = write(tmp_path / "docs", a=TEXTS[0], b=TEXTS[2])
    first, second = CountingEmbedder(embedder), CountingEmbedder(embedder)
    _, update = Index.open(folder, first)
    assert update.added == ["a.txt", "b.txt"] and sorted(first.texts) == sorted([TEXTS[0], TEXTS[2]])
    index, update = Index.open(folder, second)
    assert not update and update.kept == ["a.txt", "b.txt"]
    Retriever(index).search("Who feeds the goat?")
    assert second.texts == ["Who feeds the goat?"]


def test_update_embeds_only_what_is_new(indexes, embedder, tmp_path):
    folder = write(tmp_path / "docs", a=TEXTS[0], b=TEXTS[1], c=TEXTS[2])
    Index.open(folder, embedder)
    write(folder, b="The fare is 16 nebrales now.", d=TEXTS[3])
    (folder / "c.txt").unlink()
    counting = CountingEmbedder(embedder)
    index, update = Index.open(folder, counting)
    assert (update.added, update.changed, update.removed, update.kept) == (["d.txt"], ["b.txt"], ["c.txt"], ["a.txt"])
    assert sorted(counting.texts) == sorted(["The fare is 16 nebrales now.", TEXTS[3]])
    assert [chunk.file for chunk in index.chunks] == ["a.txt", "b.txt", "d.txt"]
    fresh = Index.build(index.chunks, embedder)
    assert np.allclose(fresh.vectors, index.vectors, atol=1e-5)
    assert Retriever(index).search("What does the fare cost?")[0].chunk.text == "The fare is 16 nebrales now."


def test_a_renamed_file_is_not_embedded_again(indexes, embedder, tmp_path):
    folder = write(tmp_path / "docs", a=TEXTS[0], b=TEXTS[1])
    Index.open(folder, embedder)
    (folder / "a.txt").rename(folder / "z.txt")
    counting = CountingEmbedder(embedder)
    index, update = Index.open(folder, counting)
    assert update.removed == ["a.txt"] and update.added == ["z.txt"] and counting.texts == []
    assert index.chunks[-1].file == "z.txt"


def test_the_same_text_twice_keeps_its_own_windows(indexes, embedder, tmp_path):
    long = "The weather was grey and nobody said much about it. " * 12
    folder = write(tmp_path / "docs", a=long, b=long)
    first, _ = Index.open(folder, embedder)
    write(folder, c=TEXTS[0])
    second, _ = Index.open(folder, embedder)
    assert len(second.vectors) == len(first.vectors) + 1
    assert np.bincount(second.owners).tolist()[:2] == np.bincount(first.owners).tolist()


def test_a_bad_file_is_remembered_and_stops_no_other(indexes, embedder, tmp_path):
    folder = write(tmp_path / "docs", a=TEXTS[0])
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 and nothing else")
    index, update = Index.open(folder, embedder)
    assert len(index.chunks) == 1
    assert "damaged" in str(update.report[1])
    again, update = Index.open(folder, embedder)
    assert not update and "damaged" in again.problems["broken.pdf"]


def test_a_folder_with_no_text_is_said_with_the_reasons(indexes, embedder, tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no PDF or TXT file"):
        Index.open(folder, embedder)
    (folder / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.txt: it is empty"):
        Index.open(folder, embedder)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        Index.open(tmp_path / "nowhere", embedder)
    with pytest.raises(ValueError, match="overlap is 50 and chunk_size 50"):
        Index.open(folder, embedder, 50, 50)


# What a child process runs: it opens the index of a folder, with vectors made without a model so that it is quick.
CHILD = """
import sys, time
import numpy as np
from pathlib import Path
from helpers import settings
settings.INDEXES = Path(sys.argv[2])
from helpers.retrieval import Index

class Fake:
    name, fingerprint, dtype, dimension, window_tokens = "fake", "fake", "float32", 384, 64
    def windows(self, text): return [(0, len(text))]
    def encode_windows(self, texts, progress=None):
        rows = np.array([np.random.default_rng(len(t)).normal(size=384) for t in texts], dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True), np.arange(len(texts))

print("ready", flush=True)
index, update = Index.open(Path(sys.argv[1]), Fake())
print(len(index.chunks), len(update.added), len(update.changed), flush=True)
"""


def child(folder, indexes):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(indexes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.split("\n")[1]


def killed_builds(folder, indexes, rounds, seed):
    """Kill `rounds` builds at random moments; after each, the index must be whole: the old one or the new one."""
    chance = random.Random(seed)
    write(folder, **{f"f{number}": f"file {number}. " * 400 for number in range(12)})
    begin = time.perf_counter()
    finish(child(folder, indexes))
    full = time.perf_counter() - begin
    state = "version 0"
    kills = 0
    for number in range(rounds):
        old, state = state, f"version {number + 1}"
        write(folder, f0=f"{state}. " * (400 + number))
        process = child(folder, indexes)
        process.stdout.readline()  # the imports are over: from here the work is timed
        time.sleep(chance.uniform(0, min(0.4, full)))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        process.stdout.close()
        process.stderr.close()
        found = stored_text(indexes)
        assert found in (old, state), f"neither {old} nor {state} but {found!r}"
        chunks = len(split_documents(load_documents(folder)[0]))
        assert finish(child(folder, indexes)).startswith(f"{chunks} "), "the next build did not repair it"
        assert stored_text(indexes) == state
    assert not list(indexes.glob(".*"))
    return kills


def stored_text(indexes):
    """Return the version that the index on disk holds, read as a reader reads it: under the lock, hashes checked."""
    from helpers.storage import checked_manifest, locked

    names = {path.name.strip(".").split(".")[0] for path in indexes.iterdir()}
    assert len(names) == 1
    folder = indexes / names.pop()
    with locked(folder):
        checked_manifest(folder, 1)
        first = json.loads((folder / "chunks.jsonl").read_text().split("\n")[0])["text"]
    return "version 0" if first.startswith("file 0") else first.split(".")[0]


def test_three_killed_builds_leave_the_old_index_or_the_new(tmp_path):
    assert killed_builds(tmp_path / "docs", tmp_path / "index", rounds=3, seed=1) >= 1


@pytest.mark.stress
def test_fifty_killed_builds_leave_the_old_index_or_the_new(tmp_path):
    assert killed_builds(tmp_path / "docs", tmp_path / "index", rounds=50, seed=2) >= 25


@pytest.mark.parametrize("moment", ["old moved away", "new left behind"])
def test_a_writer_killed_between_its_renames_is_repaired(small, embedder, tmp_path, moment):
    folder = tmp_path / "saved"
    small.save(folder)
    if moment == "old moved away":
        folder.rename(tmp_path / ".saved.old")
    else:
        (tmp_path / ".saved.new").mkdir()
        (tmp_path / ".saved.new" / "chunks.jsonl").write_text("half a li")
    assert Index.load(folder, embedder).chunks == small.chunks
    small.save(folder)
    assert Index.load(folder, embedder).chunks == small.chunks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "saved.lock"]


def test_two_builds_at_once_do_the_work_once(tmp_path):
    folder = write(tmp_path / "docs", **{f"f{number}": f"file {number}. " * 400 for number in range(12)})
    both = [child(folder, tmp_path / "index") for _ in range(2)]
    chunks = len(split_documents(load_documents(folder)[0]))
    assert sorted(finish(process) for process in both) == [f"{chunks} 0 0", f"{chunks} 12 0"]


def test_a_lock_that_is_held_is_said(small, tmp_path, monkeypatch):
    from filelock import FileLock

    from helpers import storage

    monkeypatch.setattr(storage, "LOCK_SECONDS", 0.2)
    with FileLock(tmp_path / "saved.lock"), pytest.raises(TimeoutError, match=r"saved\.lock"):
        small.save(tmp_path / "saved")


def test_the_folder_of_an_index_depends_on_its_settings(embedder, tmp_path):
    names = {
        index_folder(tmp_path / docs, embedder, size, overlap)
        for docs, size, overlap in (("a", 1000, 200), ("b", 1000, 200), ("a", 500, 200), ("a", 1000, 100))
    }
    assert len(names) == 4
    for name in ("WINDOW_OVERLAP", "BM25_K1", "BM25_B"):  # these are in what is stored too
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(settings, name, 7)
            names.add(index_folder(tmp_path / "a", embedder, 1000, 200))
    assert len(names) == 7


def test_a_backup_beside_the_index_is_left_alone(small, embedder, tmp_path):
    small.save(tmp_path / "saved")
    for name in ("saved.old", "saved.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    small.save(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "saved.before")
    with pytest.raises(FileNotFoundError, match="There is no index in"):
        Index.load(tmp_path / "saved", embedder)
    assert all((tmp_path / name / "mine").exists() for name in ("saved.old", "saved.new"))


def test_a_full_disk_is_an_oserror_and_leaves_the_old_index(small, embedder, tmp_path):
    """Files may grow to a thousand bytes: writing fails as on a full disk."""
    small.save(tmp_path / "saved")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            small.save(tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Index.load(tmp_path / "saved", embedder).chunks == small.chunks


def test_a_file_that_is_not_read_is_not_hashed_either(embedder, tmp_path, monkeypatch):
    """A film of gigabytes among the documents would delay each answer of a chat."""
    folder, hashed = write(tmp_path / "docs", one="Some text."), []
    (folder / "film.mp4").write_bytes(b"x" * 100)
    monkeypatch.setattr("helpers.retrieval.sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    monkeypatch.setattr(settings, "INDEXES", tmp_path / "index")
    index, _ = Index.open(folder, embedder)
    assert "unknown type (.mp4)" in index.problems["film.mp4"]
    assert not index.update(folder) and hashed == ["one.txt"] * 2
