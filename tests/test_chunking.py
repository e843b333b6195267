"""Pages to chunks: where they are cut, what they are called, and what is refused."""

import hashlib
import itertools
import random
import shutil

import pytest

from helpers import settings
from helpers.chunking import (
    SEPARATORS,
    Document,
    FileReport,
    check_sizes,
    chunk_id,
    chunks_at,
    clean,
    decode,
    load_documents,
    looks_garbled,
    printable,
    split_documents,
    split_text,
)

SIZES = [(1000, 200), (1000, 0), (300, 299), (120, 40), (37, 36), (10, 3), (2, 1), (2, 0)]
ALPHABET = ["a", "niño", "señal", "light", ".", ". ", " ", "  ", "\n", "\n\n", "\n\n\n", "x" * 25, "😀", "é", ",", "\t"]


@pytest.fixture(scope="module")
def sample():
    return load_documents(settings.DOCUMENTS)


def random_text(seed):
    """Words, separators, blank stretches and long words in any order; lengths from 0 to some thousands."""
    rng = random.Random(seed)
    likely = [rng.choice(ALPHABET) for _ in range(rng.randint(1, 6))]
    return "".join(rng.choice(likely if rng.random() < 0.8 else ALPHABET) for _ in range(rng.randint(0, 700)))


def pages(*texts):
    return [Document(text, "a.txt", number, "", "") for number, text in enumerate(texts, start=1)]


def langchain_texts(text, size, overlap):
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    splitter = RecursiveCharacterTextSplitter(
        chunk_size=size, chunk_overlap=overlap, separators=[*SEPARATORS, ""], keep_separator="end"
    )
    return splitter.split_text(text)


def assert_sound(text, chunks, size):
    """What must hold for the chunks of any page."""
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.end]
        assert 0 < len(chunk.text) <= size
        assert chunk.text == chunk.text.strip()
    assert all(a.start <= b.start and a.end <= b.end for a, b in itertools.pairwise(chunks))
    covered = bytearray(len(text))
    for chunk in chunks:
        covered[chunk.start : chunk.end] = b"\1" * len(chunk.text)
    assert all(seen or char.isspace() for seen, char in zip(covered, text, strict=True))
    assert len({chunk.id for chunk in chunks}) == len(chunks)


@pytest.mark.parametrize(("size", "overlap"), SIZES)
def test_chunks_of_random_pages_are_sound(size, overlap):
    for seed in range(40):
        text = random_text(seed)
        assert_sound(text, split_documents(pages(text), size, overlap), size)


@pytest.mark.parametrize(("size", "overlap"), SIZES[:4])
def test_chunks_of_the_sample_documents_are_sound(sample, size, overlap):
    documents, _ = sample
    chunks = split_documents(documents, size, overlap)
    by_page = {}
    for chunk in chunks:
        by_page.setdefault((chunk.file, chunk.page), []).append(chunk)
    assert len(by_page) == len(documents)
    for document in documents:
        found = by_page[document.file, document.page]
        assert_sound(document.text, found, size)
        assert {chunk.page_label for chunk in found} == {document.page_label}


@pytest.mark.parametrize(("size", "overlap"), SIZES)
def test_random_pages_are_cut_as_langchain_cuts_them(size, overlap):
    for seed in range(40):
        text = random_text(seed)
        ours = [text[start:end] for start, end in split_text(text, size, overlap)]
        # LangChain gives a chunk twice where only white space sets the two apart; neighbours alike count once.
        once = [
            [text for text, _ in itertools.groupby(texts)] for texts in (ours, langchain_texts(text, size, overlap))
        ]
        assert once[0] == once[1], f"seed {seed}"


@pytest.mark.parametrize(("size", "overlap"), SIZES[:4])
def test_the_sample_documents_are_cut_as_langchain_cuts_them(sample, size, overlap):
    for document in sample[0]:
        ours = [chunk.text for chunk in split_documents([document], size, overlap)]
        assert ours == langchain_texts(document.text, size, overlap)


def test_neighbours_share_text_only_if_asked():
    text = " ".join(f"word{number:03}" for number in range(300))
    apart = split_documents(pages(text), 200, 0)
    shared = split_documents(pages(text), 200, 50)
    assert all(a.end <= b.start for a, b in itertools.pairwise(apart))
    assert all(0 < a.end - b.start <= 50 for a, b in itertools.pairwise(shared))


def test_a_short_page_is_one_chunk_and_a_blank_one_none():
    chunks = split_documents(pages("  Two words. \n", " \n\t ", "", "x"))
    assert [(chunk.text, chunk.page, chunk.start, chunk.end) for chunk in chunks] == [
        ("Two words.", 1, 2, 12),
        ("x", 4, 0, 1),
    ]


def test_no_chunk_crosses_a_page():
    chunks = split_documents(pages("First page.", "Second page."), 1000, 200)
    assert [chunk.text for chunk in chunks] == ["First page.", "Second page."]


def test_the_defaults_are_the_settings(sample):
    default = split_documents(sample[0])
    assert default == split_documents(sample[0], settings.CHUNK_SIZE, settings.CHUNK_OVERLAP)
    assert (settings.CHUNK_SIZE, settings.CHUNK_OVERLAP) == (1000, 200)
    assert max(len(chunk.text) for chunk in default) > 900


@pytest.mark.parametrize(
    ("size", "overlap"), [(0, 0), (-5, 0), (100, 100), (100, 250), (100, -1), (1, 1)], ids=lambda n: str(n)
)
def test_impossible_sizes_are_refused_with_their_numbers(size, overlap):
    with pytest.raises(ValueError) as error:
        split_documents(pages("some text"), size, overlap)
    numbers = [size] if size < 1 else [size, overlap]
    assert all(str(number) in str(error.value) for number in numbers)
    assert "chunk_size" in str(error.value) or "overlap" in str(error.value)


def test_impossible_sizes_are_refused_even_without_documents():
    with pytest.raises(ValueError, match=r"overlap is 7 and chunk_size 7"):
        split_documents([], 7, 7)


def test_the_smallest_and_largest_sizes_work():
    check_sizes(1, 0)
    assert [chunk.text for chunk in split_documents(pages("abc"), 1, 0)] == ["a", "b", "c"]
    assert [chunk.text for chunk in split_documents(pages("abc"), 10**9, 10**9 - 1)] == ["abc"]


def test_an_id_is_a_hash_of_path_page_start_and_text():
    whole = hashlib.sha256("sub/ñ.pdf\x003\x00800\x00¡Luz!".encode()).hexdigest()
    assert chunk_id("sub/ñ.pdf", 3, 800, "¡Luz!") == whole[:16]
    base = ("a.pdf", 1, 2, "text")
    others = [("b.pdf", 1, 2, "text"), ("a.pdf", 2, 2, "text"), ("a.pdf", 1, 3, "text"), ("a.pdf", 1, 2, "texts")]
    assert len({chunk_id(*parts) for parts in [base, *others]}) == 5
    assert chunk_id("a", 1, 23, "") != chunk_id("a", 12, 3, "")  # the parts are kept apart


def test_ids_are_the_same_wherever_the_folder_stands(sample, tmp_path):
    copy = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(settings.DOCUMENTS, copy)
    again = split_documents(load_documents(copy)[0])
    assert [chunk.id for chunk in again] == [chunk.id for chunk in split_documents(sample[0])]
    assert again == split_documents(load_documents(str(copy))[0])


def test_the_same_words_on_two_pages_or_files_have_ids_of_their_own(sample):
    ids = [chunk.id for chunk in split_documents(sample[0])]
    assert len(ids) == len(set(ids)) > 200


def test_every_sample_document_is_read_without_a_problem(sample):
    documents, report = sample
    assert [row for row in report if row.problem] == []
    assert len(report) == len({row.file for row in report}) >= 12
    assert sum(row.pages for row in report) == len(documents) >= 60
    for row in report:
        own = [document for document in documents if document.file == row.file]
        assert row.characters == sum(len(document.text) for document in own)
        digest = hashlib.sha256((settings.DOCUMENTS / row.file).read_bytes()).hexdigest()
        assert {document.file_sha256 for document in own} == {digest}
        assert [document.page for document in own] == list(range(1, row.pages + 1))


@pytest.mark.parametrize(("file", "roman"), [("annual_report_2025.pdf", 3), ("memoria_historica.pdf", 2)])
def test_page_labels_are_the_numbers_printed_on_the_pages(sample, file, roman):
    own = [document for document in sample[0] if document.file == file]
    labels = [document.page_label for document in own]
    assert labels[:roman] == ["i", "ii", "iii"][:roman]
    assert labels[roman:] == [str(number) for number in range(1, len(own) - roman + 1)]
    for document in own:  # the sample documents print the label at the foot of the page
        assert document.text.strip().splitlines()[-1] == document.page_label


def test_a_txt_is_page_1_without_a_label(sample):
    own = [document for document in sample[0] if document.file.endswith(".txt")]
    assert own and {(document.page, document.page_label) for document in own} == {(1, "")}


def test_chunks_at_returns_the_chunks_that_hold_a_passage(sample):
    chunks = split_documents(sample[0])
    for chunk in chunks[::10]:
        found = chunks_at(chunks, chunk.file, chunk.page, chunk.start + 1, chunk.end - 1)
        assert chunk in found
        assert all(chunk.text[1:-1] in other.text and other.file == chunk.file for other in found)
    first = chunks[0]
    assert chunks_at(chunks, first.file, first.page, first.start, 10**6) == []


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("light-\nhouse", "lighthouse"),
        ("en-\nciende", "enciende"),
        ("pages 3-\n4", "pages 3-\n4"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("one page.\fThe next", "one page.\nThe next"),
        ("con n\u0303", "con ñ"),
        ("e\ufb03cient \ufb01re", "efficient fire"),
        ("soft\u00adware\u00a0x", "software x"),
        ("a\0b\x07c\u200bd\ufeff", "abcd"),
        ("\ud800x", "x"),
    ],
)
def test_clean(raw, cleaned):
    assert clean(raw) == cleaned
    assert clean(cleaned) == cleaned


def test_cleaned_text_can_be_stored_as_utf8():
    text = "".join(map(chr, range(0x11000)))
    clean(text).encode("utf-8")


@pytest.mark.parametrize("seed", range(3))
def test_decode_never_raises(seed):
    rng = random.Random(seed)
    for length in (1, 2, 3, 5, 100, 1000):
        for start in (b"", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\0", b"\0a"):
            text = decode(start + rng.randbytes(length))
            assert text is None or isinstance(text, str)


def test_decode_drops_the_mark_and_refuses_binary_data():
    assert decode(b"\xef\xbb\xbfse\xc3\xb1al") == "señal"
    assert decode(b"\xff\xfe" + "señal".encode("utf-16-le")) == "señal"
    assert decode(b"lighthouse\0" * 50) is None  # a few zero bytes are no UTF-16
    assert decode(b"\0" * 50) is None


def caesar(text):
    return "".join(chr((ord(c) - 97 + 3) % 26 + 97) if "a" <= c <= "z" else c for c in text.lower())


def test_garbled_text_is_told_from_text(sample):
    page = next(document.text for document in sample[0] if document.page == 4)
    assert looks_garbled(caesar(page))
    assert looks_garbled(page.replace("e", "\ufffd"))
    assert looks_garbled("(cid:12)(cid:7) " * 20)
    spanish = next(document.text for document in sample[0] if document.file == "acta_asamblea_2025.txt")
    assert looks_garbled(spanish.encode("utf-8").decode("latin-1"))
    assert not looks_garbled("")
    assert not looks_garbled("BX-1174 | 14.50 | 23 kg\n" * 50)  # a table of codes has few vowels too
    assert not looks_garbled("Łódź, Þingvellir, Straße, κύμα, 灯台は九時に開く。")


def test_a_report_is_one_readable_line():
    assert str(FileReport("a.pdf", 1, 1234)) == "a.pdf: 1 page, 1,234 characters"
    assert str(FileReport("a.pdf", 2, 10)).startswith("a.pdf: 2 pages")
    bad = FileReport("a\nb\x1b[31m.pdf", 1, 10, "page 2 is damaged", "Export it again.")
    assert str(bad) == r"a\nb\x1b[31m.pdf: page 2 is damaged; 1 page read. Export it again."


def test_printable_escapes_what_is_no_letter():
    assert printable("niño's café.txt") == "niño's café.txt"
    assert printable("a\nb\tc\x1bd\u202e") == r"a\nb\tc\x1bd\u202e"
    assert printable("\udcff") == r"\udcff"


@pytest.mark.parametrize("hyphen", ["-", "\u2010", "\u00ad"])
def test_a_divided_word_is_whole_again_whatever_hyphen_divides_it(hyphen):
    assert clean(f"la seña{hyphen}\r\nlización") == "la señalización"
    assert clean(f"1990{hyphen.strip(chr(0xAD))}\n2000").count("\n") == 1  # a range of years isn't a word
