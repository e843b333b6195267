"""Folders that go wrong: every file is read or reported, none stops the others, and nothing hangs.

What might hang or needs another user is read in a child process with a limit of time.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
import zlib
from pathlib import Path

import pytest

from helpers import settings
from helpers.chunking import load_documents, split_documents

SENTENCE = "The lighthouse opens at nine."
SPANISH = "El farero encendió la señal a las nueve — ¡qué mañana! «Niebla», dijo; costó 14 €.\n" * 5
NOBODY = 65534

needs_links = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
needs_posix = pytest.mark.skipif(not hasattr(os, "setuid"), reason="file modes and pipes of POSIX")


# --- PDFs made by hand, object by object ---------------------------------------------------------------------------


def raw_pdf(objects, trailer=b"/Root 1 0 R"):
    """Return the bytes of a PDF with these numbered objects, however little sense they make."""
    data, offsets = b"%PDF-1.7\n", {}
    for number, body in objects.items():
        offsets[number] = len(data)
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table, size = len(data), max(objects) + 1
    data += b"xref\n0 %d\n0000000000 65535 f \n" % size
    for number in range(1, size):
        data += b"%010d 00000 n \n" % offsets[number] if number in offsets else b"0000000000 65535 f \n"
    return data + b"trailer\n<< /Size %d %s >>\nstartxref\n%d\n%%%%EOF\n" % (size, trailer, table)


def stream(content, entries=b""):
    return b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(content), entries, content)


def page(contents=b"4 0 R", parent=b"2 0 R", resources=b"<< /Font << /F1 9 0 R >> >>"):
    parts = b"/Parent %s /MediaBox [0 0 612 792] /Resources %s /Contents %s"
    return b"<< /Type /Page " + parts % (parent, resources, contents) + b" >>"


def kids(*numbers, count=None, parent=b""):
    listed = b" ".join(b"%d 0 R" % number for number in numbers)
    return b"<< /Type /Pages /Kids [%s] /Count %d %s >>" % (listed, len(numbers) if count is None else count, parent)


def says(text):
    return stream(b"BT /F1 12 Tf 72 700 Td (%s) Tj ET" % text.encode("cp1252"))


FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"
FORM = b"/Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << /XObject << /X 5 0 R >> >>"
CATALOG = b"<< /Type /Catalog /Pages 2 0 R >>"
GOOD = {1: CATALOG, 2: kids(3), 3: page(), 4: says(SENTENCE), 9: FONT}
WRONG_OPERANDS = stream(b"BT /F1 12 Tf (a) (b) Td Tj ET >> << ]")
THREE = {**GOOD, 2: kids(3, 5, 6), 5: page(b"7 0 R"), 6: page(), 7: says("Page two.")}


def good_pdf():
    return raw_pdf(GOOD)


def encrypted_pdf(user, algorithm):
    import io

    from pypdf import PdfReader, PdfWriter

    writer, out = PdfWriter(PdfReader(io.BytesIO(good_pdf()))), io.BytesIO()
    writer.encrypt(user_password=user, owner_password="owner", algorithm=algorithm)
    writer.write(out)
    return out.getvalue()


def scanned_pdf():
    """Two pages that each hold one grey picture and no text."""
    picture = stream(
        zlib.compress(bytes(64 * 64)),
        b"/Type /XObject /Subtype /Image /Width 64 /Height 64 /ColorSpace /DeviceGray /BitsPerComponent 8 "
        b"/Filter /FlateDecode",
    )
    drawn = page(b"4 0 R", resources=b"<< /XObject << /Im 5 0 R >> >>")
    return raw_pdf({1: CATALOG, 2: kids(3, 6), 3: drawn, 6: drawn, 4: stream(b"612 0 0 792 0 0 cm /Im Do"), 5: picture})


def doubling_tree(depth=40):
    """A page tree in which each node names the next one twice: 2 ** depth pages in a few kilobytes."""
    tree = {10 + i: kids(11 + i, 11 + i) for i in range(depth)}
    return raw_pdf({**GOOD, **tree, 1: b"<< /Type /Catalog /Pages 10 0 R >>", 10 + depth: page()})


def doubling_forms(depth=40):
    """A page that draws a form that draws the next form twice, and so on, the last one the first."""
    forms = {}
    for i in range(depth):
        following = 20 + (i + 1) % depth
        entries = b"/Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << /XObject << /X %d 0 R >> >>"
        forms[20 + i] = stream(b"/X Do /X Do", entries % following)
    drawn = page(resources=b"<< /Font << /F1 9 0 R >> /XObject << /X 20 0 R >> >>")
    return raw_pdf({**GOOD, **forms, 3: drawn, 4: stream(b"BT /F1 12 Tf (x) Tj ET /X Do")})


def xref_chain_to_itself():
    data = good_pdf()
    table = data.rsplit(b"startxref\n", 1)[1].split(b"\n")[0]
    return data.replace(b"/Root 1 0 R", b"/Root 1 0 R /Prev " + table)


SELF_REFERENCING = {
    "kids-itself": {**GOOD, 2: kids(2)},
    "kids-itself-and-a-page": {**GOOD, 2: kids(2, 3)},
    "kids-itself-twice": {**GOOD, 2: kids(2, 2, 3)},
    "kids-loop-of-two": {**GOOD, 2: kids(5, 5), 5: kids(2, 2, 3, parent=b"/Parent 2 0 R")},
    "kids-object-is-itself": {**GOOD, 2: b"<< /Type /Pages /Kids 5 0 R /Count 1 >>", 5: b"5 0 R"},
    "kids-array-holds-itself": {**GOOD, 2: b"<< /Type /Pages /Kids 5 0 R /Count 1 >>", 5: b"[5 0 R]"},
    "pages-is-the-catalog": {**GOOD, 1: b"<< /Type /Catalog /Pages 1 0 R >>"},
    "count-of-a-thousand-million": {**GOOD, 2: kids(3, count=10**9)},
    "parent-is-the-page": {**GOOD, 3: b"<< /Type /Page /Parent 3 0 R /Contents 4 0 R >>"},
    "parent-of-the-tree-is-itself": {
        **GOOD,
        2: kids(3, parent=b"/Parent 2 0 R"),
        3: b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R >>",
    },
    "parents-in-a-ring": {
        **GOOD,
        2: kids(3, parent=b"/Parent 5 0 R"),
        5: kids(2, parent=b"/Parent 2 0 R"),
        3: b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R >>",
    },
    "contents-is-the-page": {**GOOD, 3: page(b"3 0 R")},
    "contents-object-is-itself": {**GOOD, 4: b"4 0 R"},
    "contents-array-holds-itself": {**GOOD, 4: b"[4 0 R]"},
    "contents-array-holds-itself-and-text": {**GOOD, 4: b"[4 0 R 4 0 R 5 0 R]", 5: says(SENTENCE)},
    "stream-is-its-own-length": {**GOOD, 4: b"<< /Length 4 0 R >>\nstream\nBT /F1 12 Tf (x) Tj ET\nendstream"},
    "form-draws-itself": {
        **GOOD,
        3: page(resources=b"<< /Font << /F1 9 0 R >> /XObject << /X 5 0 R >> >>"),
        4: stream(b"BT /F1 12 Tf (x) Tj ET /X Do"),
        5: stream(b"/X Do /X Do", FORM),
    },
    "font-is-its-own-descendant": {
        **GOOD,
        9: b"<< /Type /Font /Subtype /Type0 /BaseFont /X /Encoding /Identity-H /DescendantFonts [9 0 R] >>",
    },
    "label-tree-loops": {**GOOD, 1: b"<< /Type /Catalog /Pages 2 0 R /PageLabels 6 0 R >>", 6: b"<< /Kids [6 0 R] >>"},
    "tree-doubles": doubling_tree(),
    "forms-double": doubling_forms(),
    "xref-chain": xref_chain_to_itself(),
}


# --- Helpers -------------------------------------------------------------------------------------------------------


def put(folder, **files):
    """Write files named like `bad_pdf` into `folder` (as bad.pdf) next to a good one; return the folder."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        stem, suffix = name.rsplit("_", 1)
        (folder / f"{stem}.{suffix}").write_bytes(data.encode() if isinstance(data, str) else data)
    (folder / "zz_good.txt").write_text(SENTENCE, encoding="utf-8")
    return folder


def read_one(folder):
    """Return (pages, row) of the one file beside zz_good.txt, which must be read whatever the other is."""
    documents, report = load_documents(folder)
    assert [row.file for row in report][-1] == "zz_good.txt" and not report[-1].problem
    assert [document.text for document in documents][-1] == SENTENCE
    assert len(report) == 2
    return documents[:-1], report[0]


def assert_refused(folder, *said):
    documents, row = read_one(folder)
    assert documents == [] and row.pages == row.characters == 0
    assert all(part in row.problem for part in said), row.problem
    assert row.advice
    return row


CHILD = """
import json, os, sys
from pathlib import Path
from helpers.chunking import load_documents
load_documents(sys.argv[2])  # imports what reading PDFs needs while the packages can still be read
if sys.argv[3] != "as-is":
    os.setgroups([])
    os.setgid(int(sys.argv[3]))
    os.setuid(int(sys.argv[3]))
documents, report = load_documents(sys.argv[1])
print(json.dumps({"texts": {f"{d.file}:{d.page}": d.text for d in documents},
                  "problems": {row.file: row.problem for row in report},
                  "advice": {row.file: row.advice for row in report}}))
"""


def read_in_child(folder, seconds=20, user="as-is"):
    """Read `folder` in a process of its own that is killed, and the test failed, after `seconds`."""
    with tempfile.TemporaryDirectory() as warm:
        (Path(warm) / "good.pdf").write_bytes(good_pdf())
        command = [sys.executable, "-c", CHILD, str(folder), warm, str(user)]
        done = subprocess.run(command, capture_output=True, timeout=seconds, cwd=settings.ROOT, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return json.loads(done.stdout)


@pytest.fixture
def shared_folder():
    """A folder that every user can reach (pytest's own are closed to others)."""
    folder = Path(tempfile.mkdtemp(prefix="helpers_test_"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


# --- PDFs ----------------------------------------------------------------------------------------------------------


def test_the_good_pdf_is_good(tmp_path):
    documents, row = read_one(put(tmp_path, a_pdf=good_pdf()))
    assert [document.text for document in documents] == [SENTENCE]
    assert (row.pages, row.characters, row.problem) == (1, len(SENTENCE), "")


ALGORITHMS = ["RC4-40", "RC4-128", "AES-128", "AES-256-R5", "AES-256"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_encrypted_pdf_is_reported(tmp_path, algorithm):
    row = assert_refused(put(tmp_path, a_pdf=encrypted_pdf("secret", algorithm)), "encrypted")
    assert "password" in row.advice


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_encrypted_pdf_with_an_empty_user_password_is_read(tmp_path, algorithm):
    data = encrypted_pdf("", algorithm)
    assert b"/Encrypt" in data and SENTENCE.encode() not in data
    documents, row = read_one(put(tmp_path, a_pdf=data))
    assert [document.text for document in documents] == [SENTENCE]
    assert not row.problem


def test_an_unknown_encryption_is_reported_as_encrypted(tmp_path):
    data = raw_pdf(
        {**GOOD, 8: b"<< /Filter /Acme.Lock /V 1 /R 2 /O (x) /U (y) /P -4 >>"},
        b"/Root 1 0 R /Encrypt 8 0 R /ID [(0123456789abcdef) (0123456789abcdef)]",
    )
    assert_refused(put(tmp_path, a_pdf=data), "encrypted")


@pytest.mark.parametrize("share", [0.005, 0.05, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_pdf_is_reported(tmp_path, share):
    whole = (settings.DOCUMENTS / "annual_report_2025.pdf").read_bytes()
    row = assert_refused(put(tmp_path, a_pdf=whole[: int(share * len(whole))]), "damaged")
    assert "again" in row.advice


def test_a_pdf_of_noise_is_reported(tmp_path):
    rng = random.Random(1)
    for length in (0, 1, 100, 10_000):
        assert_refused(put(tmp_path, a_pdf=b"%PDF-1.7\n" + rng.randbytes(length)), "damaged")


def test_pdfs_with_flipped_bytes_never_stop_the_others(tmp_path):
    rng = random.Random(2)
    whole = (settings.DOCUMENTS / "tarifas_amarre_2025.pdf").read_bytes()
    for number in range(12):
        data = bytearray(whole)
        for _ in range(200):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / f"{number:02}.pdf").write_bytes(data)
    put(tmp_path)
    documents, report = load_documents(tmp_path)
    assert len(report) == 13 and documents[-1].text == SENTENCE
    for row in report:
        assert row.problem or row.pages


@pytest.mark.parametrize("suffix", ["pdf", "txt"])
def test_a_file_of_zero_bytes_is_reported(tmp_path, suffix):
    assert_refused(put(tmp_path, **{f"a_{suffix}": b""}), "empty", "0 bytes")


def test_a_scanned_pdf_is_reported(tmp_path):
    row = assert_refused(put(tmp_path, a_pdf=scanned_pdf()), "no text on its 2 pages", "scanned")
    assert "OCR" in row.advice


def test_one_scanned_page_among_others_is_reported_and_the_others_read(tmp_path):
    documents, row = read_one(put(tmp_path, a_pdf=raw_pdf({**THREE, 7: stream(b"")})))
    assert [document.page for document in documents] == [1, 3]
    assert "no text on page 2" in row.problem and "OCR" in row.advice and row.pages == 2


def test_a_pdf_without_pages_is_reported(tmp_path):
    assert_refused(put(tmp_path, a_pdf=raw_pdf({1: CATALOG, 2: kids()})), "damaged")


@pytest.mark.parametrize(
    "broken",
    [
        stream(b"BT", b"/Filter /NoSuchFilter"),
        WRONG_OPERANDS,
        stream(b"BT /F1 Tf /Foo Td 3 Tj (unclosed"),
        stream(zlib.compress(b" " * 200_000_000, 1), b"/Filter /FlateDecode"),
    ],
    ids=["unknown-filter", "wrong-operands", "unclosed-string", "bomb"],
)
def test_one_broken_page_loses_none_of_the_others(tmp_path, broken):
    documents, row = read_one(put(tmp_path, a_pdf=raw_pdf({**THREE, 7: broken})))
    assert [(document.page, document.text) for document in documents] == [(1, SENTENCE), (3, SENTENCE)]
    assert "page 2 is damaged" in row.problem and row.advice
    assert (row.pages, row.characters) == (2, 2 * len(SENTENCE))


def test_a_page_whose_compressed_content_is_nonsense_is_reported(tmp_path):
    content = stream(b"nonsense", b"/Filter /FlateDecode")
    documents, row = read_one(put(tmp_path, a_pdf=raw_pdf({**THREE, 7: content})))
    assert [document.page for document in documents] == [1, 3]
    assert "page 2" in row.problem and row.advice


def test_a_pdf_with_only_broken_pages_is_damaged_not_encrypted(tmp_path):
    broken = stream(b"BT", b"/Filter /NoSuchFilter")
    assert_refused(put(tmp_path, a_pdf=raw_pdf({**THREE, 4: broken, 7: broken})), "it is damaged")


def test_every_kind_of_fault_in_one_pdf_is_said(tmp_path):
    cipher = "wkh oljkwkrxvh rshqv dw qlqh dqg forvhv dw hljkw hyhub gdb " * 8
    data = raw_pdf({**THREE, 2: kids(3, 5, 6, 8), 6: page(b"10 0 R"), 8: page(b"11 0 R"), 7: WRONG_OPERANDS,
                    10: says(cipher), 11: stream(b"")})  # fmt: skip
    documents, row = read_one(put(tmp_path, a_pdf=data))
    assert [document.page for document in documents] == [1]
    assert "page 2 is damaged" in row.problem
    assert "page 3 looks garbled" in row.problem
    assert "no text on page 4" in row.problem
    assert "OCR" in row.advice and "again" in row.advice


def test_a_broken_label_tree_costs_no_page(tmp_path):
    for labels in (b"42", b"<< /Nums [0 42] >>", b"<< /Nums [(x) << /S /r >>] >>", b"<< /Kids 7 >>"):
        catalog = b"<< /Type /Catalog /Pages 2 0 R /PageLabels %s >>" % labels
        documents, row = read_one(put(tmp_path, a_pdf=raw_pdf({**THREE, 1: catalog})))
        assert [document.page for document in documents] == [1, 2, 3] and not row.problem


@pytest.mark.parametrize("labels", [ZeroDivisionError, RecursionError, ["i"], []])
def test_labels_that_cannot_be_had_or_do_not_match_are_counted(tmp_path, monkeypatch, labels):
    import pypdf

    def page_labels(reader):
        if isinstance(labels, list):
            return labels
        raise labels

    monkeypatch.setattr(pypdf.PdfReader, "page_labels", property(page_labels))
    documents, row = read_one(put(tmp_path, a_pdf=raw_pdf(THREE)))
    assert [document.page_label for document in documents] == ["1", "2", "3"] and not row.problem


def test_a_pdf_named_txt_and_a_text_named_pdf_are_reported(tmp_path):
    assert "Rename" in assert_refused(put(tmp_path / "1", a_txt=good_pdf()), "PDF named .txt").advice
    assert_refused(put(tmp_path / "2", a_pdf=SENTENCE), "not a PDF")
    assert_refused(put(tmp_path / "3", a_pdf=f"<html>{SENTENCE}</html>"), "not a PDF")


def test_a_text_about_pdfs_is_a_text(tmp_path):
    documents, row = read_one(put(tmp_path, a_txt="Every such file begins with %PDF-1.7 and ends with %%EOF."))
    assert len(documents) == 1 and not row.problem


@pytest.mark.parametrize("case", SELF_REFERENCING)
def test_a_self_referencing_pdf_ends_in_seconds(tmp_path, case):
    made = SELF_REFERENCING[case]
    put(tmp_path, a_pdf=made if isinstance(made, bytes) else raw_pdf(made))
    read = read_in_child(tmp_path)
    assert read["texts"]["zz_good.txt:1"] == SENTENCE
    # Nothing is lost in silence: the page is read, or the report says what is wrong.
    assert read["problems"]["a.pdf"] or read["texts"].get("a.pdf:1")


# --- TXT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["El farero encendió la señal. ", "luz y niebla ", "aeiou"], ids=lambda u: repr(u))
def test_a_line_of_5_mb_is_read_and_cut_within_20_seconds(tmp_path, unit):
    text = unit * (5_000_000 // len(unit))
    folder = put(tmp_path, a_txt=text)
    started = time.perf_counter()
    documents, row = read_one(folder)
    chunks = split_documents(documents)
    assert time.perf_counter() - started < 20
    assert not row.problem and documents[0].text == text
    assert max(len(chunk.text) for chunk in chunks) <= 1000
    assert chunks[0].start == 0 and chunks[-1].end == len(text.rstrip())
    assert all(chunk.text == text[chunk.start : chunk.end] for chunk in chunks[:: len(chunks) // 100])


@pytest.mark.parametrize("data", [b"\0" * 10_000, b"\0", b"lighthouse " * 50 + b"\0" * 50, bytes(range(256)) * 40])
def test_nul_bytes_are_reported(tmp_path, data):
    row = assert_refused(put(tmp_path, a_txt=data), "garbled")
    assert "UTF-8" in row.advice


def test_noise_named_txt_is_reported(tmp_path):
    assert_refused(put(tmp_path, a_txt=random.Random(3).randbytes(5000)), "garbled")


def test_text_that_looks_garbled_is_reported(tmp_path):
    assert_refused(put(tmp_path, a_txt="wkh oljkwkrxvh rshqv dw qlqh " * 20), "garbled")
    assert_refused(put(tmp_path, a_txt=SPANISH.encode("utf-8").decode("cp1252", "ignore")), "garbled")


@pytest.mark.parametrize("data", [b" \n\t\r\n ", b"\xef\xbb\xbf", b"\xff\xfe", b"\xef\xbb\xbf  \n"])
def test_a_txt_of_white_space_is_reported(tmp_path, data):
    assert_refused(put(tmp_path, a_txt=data), "white space")


ENCODINGS = {
    "utf-8": ("utf-8", b""),
    "utf-8 with a mark": ("utf-8", b"\xef\xbb\xbf"),
    "utf-16-le": ("utf-16-le", b""),
    "utf-16-be": ("utf-16-be", b""),
    "utf-16-le with a mark": ("utf-16-le", b"\xff\xfe"),
    "utf-16-be with a mark": ("utf-16-be", b"\xfe\xff"),
    "cp1252": ("cp1252", b""),
    "latin-1": ("latin-1", b""),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_each_encoding_is_detected(tmp_path, name):
    encoding, mark = ENCODINGS[name]
    text = SPANISH.replace("—", "-").replace("€", "euros") if encoding == "latin-1" else SPANISH
    documents, row = read_one(put(tmp_path, a_txt=mark + text.encode(encoding)))
    assert documents[0].text == text
    assert not row.problem


def test_bytes_that_cp1252_lacks_are_read_as_latin1(tmp_path):
    documents, _ = read_one(put(tmp_path, a_txt=b"La se\xf1al de la ma\xf1ana.\x81 Fin."))
    assert documents[0].text == "La señal de la mañana. Fin."


def test_utf8_that_is_cut_or_spoiled_in_places_stays_utf8(tmp_path):
    data = SPANISH.encode("utf-8")
    cut = data[: data.rindex("ñ".encode()) + 1]
    documents, _ = read_one(put(tmp_path, a_txt=cut))
    assert documents[0].text == cut[:-1].decode("utf-8") + "\ufffd"
    documents, _ = read_one(put(tmp_path, a_txt=b"\xff" + data))
    assert documents[0].text == "\ufffd" + SPANISH


def test_utf16_of_an_odd_length_is_read(tmp_path):
    documents, _ = read_one(put(tmp_path, a_txt=b"\xff\xfe" + SPANISH.encode("utf-16-le") + b"\x41"))
    assert documents[0].text.startswith(SPANISH)


# --- Names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "with  two spaces .txt",
        " leading.txt",
        "acción — señal.txt",
        "two\nlines.txt",
        "tab\tand\x1b[31mred.txt",
        "'quoted\" $(name).txt",
        "灯台.TXT",
        "-rf.txt",
        "a" * 200 + ".txt",
    ],
)
@needs_posix
def test_files_with_odd_names_are_read_and_reported_on_one_line(tmp_path, name):
    (tmp_path / name).write_text(SENTENCE, encoding="utf-8")
    documents, report = load_documents(tmp_path)
    assert [document.file for document in documents] == [name]
    assert str(report[0]).isprintable()
    assert len(split_documents(documents)[0].id) == 16


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow only UTF-8 in names")
def test_a_name_that_is_no_utf8_is_read(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"se\xf1al\xff.txt"), "w") as file:
        file.write(SENTENCE)
    documents, report = load_documents(tmp_path)
    assert documents[0].file == report[0].file == r"se\xf1al\xff.txt"
    documents[0].file.encode("utf-8")
    assert len(split_documents(documents)[0].id) == 16


def test_composed_and_decomposed_names_give_the_same_ids(tmp_path):
    ids = []
    for form in ("NFC", "NFD"):
        folder = tmp_path / form / unicodedata.normalize(form, "año")
        folder.mkdir(parents=True)
        (folder / unicodedata.normalize(form, "señal.txt")).write_text(SPANISH * 10, encoding="utf-8")
        documents, _ = load_documents(tmp_path / form)
        assert documents[0].file == unicodedata.normalize("NFC", "año/señal.txt")
        ids.append([chunk.id for chunk in split_documents(documents)])
    assert ids[0] == ids[1] and len(ids[0]) > 1


def test_composed_and_decomposed_text_is_the_same(tmp_path):
    texts = [read_one(put(tmp_path, a_txt=unicodedata.normalize(form, SPANISH)))[0][0].text for form in ("NFC", "NFD")]
    assert texts == [SPANISH, SPANISH]


def test_endings_count_whatever_their_case_and_others_are_reported(tmp_path):
    put(tmp_path, a_PDF=good_pdf(), b_Txt=SENTENCE, c_docx=b"PK", d_md="# x")
    (tmp_path / "README").write_text("x")
    documents, report = load_documents(tmp_path)
    assert [document.file for document in documents] == ["a.PDF", "b.Txt", "zz_good.txt"]
    problems = {row.file: row.problem for row in report if row.problem}
    assert list(problems) == ["README", "c.docx", "d.md"]
    assert all("unknown type" in problem for problem in problems.values())
    assert ".docx" in problems["c.docx"]


# --- Folders -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere") as error:
        load_documents(tmp_path / "nowhere")
    assert "--docs" in str(error.value)


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(NotADirectoryError, match=r"a\.txt is a file"):
        load_documents(tmp_path / "a.txt")


def test_an_empty_folder_gives_nothing(tmp_path):
    assert load_documents(tmp_path) == ([], [])


def test_a_folder_of_broken_files_gives_a_report_and_no_page(tmp_path):
    put(tmp_path, a_pdf=b"", b_pdf=b"%PDF-1.4 cut", c_pdf=scanned_pdf(), d_txt=b"\0\0", e_exe=b"MZ")
    (tmp_path / "zz_good.txt").unlink()
    documents, report = load_documents(tmp_path)
    assert documents == []
    assert [row.file for row in report] == ["a.pdf", "b.pdf", "c.pdf", "d.txt", "e.exe"]
    assert all(row.problem and row.advice for row in report)
    assert len({row.problem for row in report}) == 5


def test_subfolders_are_read_and_hidden_files_and_folders_not(tmp_path):
    for name in ("b/c/deep.txt", "a.txt", ".hidden.txt", ".git/x.txt", "b/.DS_Store", "b/.x/y.txt", "b/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SENTENCE, encoding="utf-8")
    documents, report = load_documents(tmp_path)
    assert [document.file for document in documents] == ["a.txt", "b/c/deep.txt", "b/z.txt"]
    assert len(report) == 3


def test_a_hidden_folder_is_read_when_it_is_the_one_asked_for(tmp_path):
    documents, _ = load_documents(put(tmp_path / ".notes"))
    assert [document.file for document in documents] == ["zz_good.txt"]


def test_a_relative_folder_is_read(tmp_path, monkeypatch):
    put(tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    assert load_documents("docs")[0] == load_documents(tmp_path / "docs")[0] == load_documents("./docs/")[0]


@needs_links
def test_links_that_leave_the_folder_are_not_followed(tmp_path):
    outside = put(tmp_path / "outside", secret_txt="The secret is seven.")
    folder = put(tmp_path / "docs")
    (folder / "sub").mkdir()
    (folder / "link.txt").symlink_to(outside / "secret.txt")
    (folder / "relative.txt").symlink_to("../outside/secret.txt")
    (folder / "chain.txt").symlink_to("link.txt")
    (folder / "linked").symlink_to(outside, target_is_directory=True)
    (folder / "sub" / "up").symlink_to("..", target_is_directory=True)
    (folder / "sub" / "gone.txt").symlink_to(tmp_path / "docs-not" / "x.txt")
    documents, report = load_documents(folder)
    assert [document.file for document in documents] == [row.file for row in report] == ["zz_good.txt"]


@needs_links
def test_a_link_inside_the_folder_is_followed_and_a_linked_folder_can_be_asked_for(tmp_path):
    folder = put(tmp_path / "docs")
    (folder / "inside.txt").symlink_to("zz_good.txt")
    (tmp_path / "alias").symlink_to(folder, target_is_directory=True)
    for asked in (folder, tmp_path / "alias"):
        documents, _ = load_documents(asked)
        assert [document.file for document in documents] == ["inside.txt", "zz_good.txt"]


@needs_links
def test_a_dangling_link_is_reported(tmp_path):
    folder = put(tmp_path)
    (folder / "gone.txt").symlink_to("nothing.txt")
    assert_refused(folder, "can't be opened")


@needs_links
def test_links_that_lead_to_themselves_are_reported(tmp_path):
    folder = put(tmp_path)
    (folder / "ring.txt").symlink_to("ring.txt")
    assert_refused(folder, "can't be opened")


@needs_posix
def test_a_pipe_is_reported_and_does_not_hang(tmp_path):
    folder = put(tmp_path)
    os.mkfifo(folder / "pipe.txt")
    os.mkfifo(folder / "pipe.pdf")
    read = read_in_child(folder)
    assert read["texts"] == {"zz_good.txt:1": SENTENCE}
    assert "not a regular file" in read["problems"]["pipe.txt"] == read["problems"]["pipe.pdf"]


@needs_posix
def test_unreadable_files_and_folders_are_reported(shared_folder):
    folder = put(shared_folder, locked_txt=SENTENCE, locked_pdf=good_pdf())
    (folder / "closed").mkdir()
    (folder / "closed" / "inside.txt").write_text(SENTENCE)
    for name in ("locked.txt", "locked.pdf", "closed"):
        (folder / name).chmod(0)
    read = read_in_child(folder, user=NOBODY if os.getuid() == 0 else "as-is")
    assert read["texts"] == {"zz_good.txt:1": SENTENCE}
    assert read["problems"].pop("zz_good.txt") == ""
    assert sorted(read["problems"]) == ["closed", "locked.pdf", "locked.txt"]
    assert all("can't be opened" in problem for problem in read["problems"].values())
    assert all("may read it" in read["advice"][name] for name in read["problems"])


def test_everything_at_once(tmp_path):
    """One folder with a file of every kind: the good ones are read, the others each have their row."""
    put(
        tmp_path,
        a_pdf=encrypted_pdf("secret", "AES-256"),
        b_pdf=good_pdf()[:200],
        c_pdf=b"",
        d_pdf=scanned_pdf(),
        e_pdf=SENTENCE,
        f_txt=good_pdf(),
        h_txt=b"\0" * 100,
        i_pdf=good_pdf(),
        j_txt=SPANISH.encode("utf-16"),
    )
    documents, report = load_documents(tmp_path)
    assert [row.file for row in report if not row.problem] == ["i.pdf", "j.txt", "zz_good.txt"]
    assert [document.text for document in documents] == [SENTENCE, SPANISH, SENTENCE]
    assert len(report) == 10
