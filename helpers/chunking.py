"""Documents to chunks: read the PDF and TXT files of a folder and cut their pages into passages.

Notebook 01 builds every step of this by hand first.
"""

import hashlib
import logging
import os
import re
import stat
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from helpers import settings

Span = tuple[int, int]

# Where a text is cut, the best place first: between paragraphs, lines, sentences, words; else anywhere.
SEPARATORS = ("\n\n", "\n", ". ", " ")
SUFFIXES = (".pdf", ".txt")
OCR = "run an OCR program over the file (for example: ocrmypdf in.pdf out.pdf) and replace the file."
EXPORT = "Open it in a PDF viewer and export it again, or download it again."

_VOWELS = re.compile(r"[aeiouyáéíóúüàèìòùâêîôûäöæœ]", re.IGNORECASE)
_LATIN = re.compile(r"[a-zà-ÿ]", re.IGNORECASE)
_WHOLE = re.compile(r"[^\x00-\x7f\ufffd]")  # beyond ASCII, and not the mark of a broken character
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff]|\(cid:\d+\)")
_MOJIBAKE = re.compile(r"Ã[\x80-\xbf¡-¿ƒ‚„…†‡‰‹“”•–—™š›œž]|â€|Â[\xa0-\xbf]")
_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "\u00ad": "", "\u00a0": " "})


@dataclass(frozen=True)
class Document:
    """One page. `page` counts from 1; `page_label` is the number printed on it ('iv'), '' in a TXT."""

    text: str
    file: str
    page: int
    page_label: str
    file_sha256: str


@dataclass(frozen=True)
class FileReport:
    """What became of one file: what was read, or in `problem` why not, and in `advice` what to do."""

    file: str
    pages: int = 0
    characters: int = 0
    problem: str = ""
    advice: str = ""

    def __str__(self) -> str:
        name = printable(self.file)
        if self.problem:
            read = f"; {_count(self.pages, 'page')} read" if self.pages else ""
            return f"{name}: {self.problem}{read}. {self.advice}".strip()
        return f"{name}: {_count(self.pages, 'page')}, {self.characters:,} characters"


@dataclass(frozen=True)
class Chunk:
    """A passage: `text` is always its page's text[start:end]; `id` is the same on every machine."""

    text: str
    file: str
    page: int
    start: int
    end: int
    id: str
    page_label: str = ""


class PageFault(Enum):
    """Why a page of a file that could be opened gave no text."""

    GARBLED = "garbled"
    DAMAGED = "damaged"


class Unreadable(Exception):
    """A file that can't be read; the first argument says why, the second what to do about it."""


def load_documents(folder: str | Path = settings.DOCUMENTS) -> tuple[list[Document], list[FileReport]]:
    """Read every PDF and TXT file below `folder`, in the order of their paths.

    Returns the pages that hold text, and a report with one row a file. A bad file never stops the others.
    Raises FileNotFoundError or NotADirectoryError if `folder` is not there or not a folder.
    """
    documents, report = [], []
    for path in find_files(folder):
        pages, row = load_file(path, folder)
        documents += pages
        report.append(row)
    return documents, report


def find_files(folder: str | Path) -> list[Path]:
    """Return the files below `folder` that a reader would expect to be read, in the order of their paths.

    Hidden files and folders are left out, and so are links that lead out of the folder. A subfolder that can't be
    opened stands in the list itself, so that it is reported.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {printable(folder)}: create it, or name another with --docs.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{printable(folder)} is a file: name the folder that holds it.")
    home = os.path.realpath(folder)
    found, unopened = [], []
    for parent, subfolders, names in os.walk(folder, onerror=unopened.append):  # follows no links to folders
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(parent) / name
            # realpath: Path.resolve raises on a link that leads to itself.
            if not name.startswith(".") and Path(os.path.realpath(path)).is_relative_to(home):
                found.append(path)
    found += [Path(error.filename) for error in unopened]
    return sorted(found, key=lambda path: relative_name(path, folder))


def is_document(path: Path) -> bool:
    """Say whether a file is one that is read, by its ending."""
    return path.suffix.lower() in SUFFIXES


def relative_name(path: Path, folder: str | Path) -> str:
    """Return `path` relative to `folder`, with '/' and composed accents on every system.

    macOS hands out file names with accents taken apart; composing them keeps chunk ids the same. Bytes that
    are no UTF-8 are shown as '\\xNN'.
    """
    name = path.relative_to(folder).as_posix()
    return unicodedata.normalize("NFC", name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def load_file(path: Path, folder: str | Path) -> tuple[list[Document], FileReport]:
    """Read one file of `folder`; return its pages that hold text and its row of the report."""
    name = relative_name(path, folder)
    try:
        data = _read(path)
        texts, labels = _read_pdf(data) if path.suffix.lower() == ".pdf" else ([_read_txt(data)], [""])
    except Unreadable as error:
        return [], FileReport(name, problem=error.args[0], advice=error.args[1])
    digest = hashlib.sha256(data).hexdigest()
    pages = [
        Document(text, name, number, label, digest)
        for number, (text, label) in enumerate(zip(texts, labels, strict=True), start=1)
        if isinstance(text, str) and text.strip()
    ]
    problem, advice = _judge(texts, path)
    return pages, FileReport(name, len(pages), sum(len(page.text) for page in pages), problem, advice)


def _judge(texts: list[str | PageFault], path: Path) -> tuple[str, str]:
    """Return what is wrong with the pages of a file that could be opened, and what to do."""
    faults = [text if isinstance(text, PageFault) else not text.strip() for text in texts]  # True: an empty page
    damaged, garbled, empty = (
        [number for number, fault in enumerate(faults, start=1) if fault is kind]
        for kind in (PageFault.DAMAGED, PageFault.GARBLED, True)
    )
    if path.suffix.lower() == ".txt":
        if garbled:
            return "its text looks garbled (not a text file, or an unknown encoding)", "Save it again as UTF-8."
        return ("it holds only white space", "Put text in it or remove it.") if empty else ("", "")
    if len(empty) == len(texts):
        return f"no text on its {_count(len(texts), 'page')} (scanned?)", f"If it is a scan, {OCR}"
    found = []
    if damaged:
        found.append((f"page {_list(damaged)} is damaged", EXPORT))
    if garbled:
        which = "its text" if len(garbled) == len(texts) else f"the text of page {_list(garbled)}"
        found.append((f"{which} looks garbled (a font without a character map)", f"To have its text, {OCR}"))
    if empty:
        found.append((f"no text on page {_list(empty)} (scanned or blank?)", f"If it is a scan, {OCR}"))
    return "; ".join(problem for problem, _ in found), " ".join(advice for _, advice in found)


def _list(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _read(path: Path) -> bytes:
    """Return the bytes of a file, refusing what is no document before any of it is parsed."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise Unreadable("this folder can't be opened", "Check that you may read it (ls -ld).")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise Unreadable("it is not a regular file", "Remove it from the folder.")
        if not is_document(path):
            kind = path.suffix or "none"
            raise Unreadable(f"unknown type ({kind})", "Only .pdf and .txt are read: convert it to one of them.")
        data = path.read_bytes()
    except OSError as error:
        advice = "Check that it exists and that you may read it (ls -l)."
        raise Unreadable(f"it can't be opened ({error.strerror})", advice) from error
    if not data:
        raise Unreadable("it is empty (0 bytes)", "Copy it again or remove it.")
    if path.suffix.lower() == ".txt" and data[:1024].lstrip().startswith(b"%PDF-"):
        raise Unreadable("it is a PDF named .txt", "Rename it to .pdf.")
    if path.suffix.lower() == ".pdf" and b"%PDF-" not in data[:1024]:
        raise Unreadable("it is not a PDF", "Give it the ending of what it is, or export it as PDF again.")
    return data


def _read_pdf(data: bytes) -> tuple[list[str | PageFault], list[str]]:
    """Return the text of each page, or why it has none, and the page labels."""
    import io

    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what matters of its warnings is in the report
    damaged = Unreadable("it is damaged", EXPORT)
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise FileNotDecryptedError
        texts = [_page_text(page) for page in reader.pages]
    except (FileNotDecryptedError, DependencyError, NotImplementedError) as error:
        advice = "Remove the password (for example: qpdf --decrypt --password=… in.pdf out.pdf) and replace it."
        raise Unreadable("it is encrypted", advice) from error
    except Exception as error:  # pypdf raises nearly anything on a broken file
        raise damaged from error
    if all(text is PageFault.DAMAGED for text in texts):  # or no page at all
        raise damaged
    return texts, _page_labels(reader, len(texts))


def _page_labels(reader, pages: int) -> list[str]:
    """Return the printed page numbers; the plain ones where the file has none or spoils them."""
    try:
        labels = list(reader.page_labels)
    except Exception:  # a broken label tree is no reason to lose the pages
        labels = []
    return labels if len(labels) == pages else [str(number) for number in range(1, pages + 1)]


def _page_text(page) -> str | PageFault:
    try:
        text = page.extract_text()
    except Exception:  # one broken page is no reason to lose the others
        return PageFault.DAMAGED
    return PageFault.GARBLED if looks_garbled(text) else clean(text)


def _read_txt(data: bytes) -> str | PageFault:
    text = decode(data)
    return PageFault.GARBLED if text is None or looks_garbled(text) else clean(text)


def decode(data: bytes) -> str | None:
    """Return the text of `data`: UTF-8 or UTF-16 (with a mark or without), else cp1252, else Latin-1.

    UTF-8 is tried first because text in another encoding is almost never valid UTF-8 by chance. Bytes 0x80
    to 0x9f are letters and quotes in cp1252 and control characters in Latin-1. None for binary data.
    """
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding, errors="replace")
    if b"\0" in data:
        # Half of the bytes of Western text in UTF-16 are zero, all on the same side.
        even, odd = data[0::2].count(0), data[1::2].count(0)
        if max(even, odd) < 0.4 * len(data) / 2 or min(even, odd) > 0.1 * len(data) / 2:
            return None
        return data.decode("utf-16-be" if even > odd else "utf-16-le", errors="replace")
    text = data.decode("utf-8", errors="replace")
    broken = text.count("\ufffd") - data.count("\ufffd".encode())
    # More whole characters beyond ASCII than broken ones: UTF-8 that was cut short or spoiled in places.
    if not broken or len(_WHOLE.findall(text)) > broken:
        return text
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def looks_garbled(text: str) -> bool:
    """Say whether `text` is noise: characters that no page prints, or letters without enough vowels.

    English has about 38 % vowels, Spanish 46 %; text in a font without a character map is a substitution
    cipher and has far fewer.
    """
    visible = len(text) - sum(char.isspace() for char in text)
    if not visible:
        return False
    if sum(len(match) for match in _UNPRINTABLE.findall(text)) > 0.05 * visible:
        return True
    if 2 * len(_MOJIBAKE.findall(text)) > 0.02 * visible:
        return True
    letters = len(_LATIN.findall(text))
    # Codes and tables of numbers have few letters, and few of those are vowels: judge running text only.
    if letters < 200 or letters < 0.6 * visible:
        return False
    return len(_VOWELS.findall(text)) < 0.25 * letters


def clean(text: str) -> str:
    """Return `text` with composed accents, plain line ends, no control characters, and words made whole.

    A word divided at the end of a line is joined again: 'light-' + 'house' becomes 'lighthouse'.
    """
    text = re.sub(r"\r\n?|[\v\f]", "\n", text)  # a form feed ends a page in many a TXT
    text = text.replace("\u00ad\n", "").translate(_LIGATURES)  # a soft hyphen at the end of a line divides a word
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u200b\ufeff]", "", text)
    return re.sub(r"(?<=[a-zà-ÿ])[-\u2010]\n(?=[a-zà-ÿ])", "", text)


def split_documents(
    documents: Iterable[Document], chunk_size: int = settings.CHUNK_SIZE, overlap: int = settings.CHUNK_OVERLAP
) -> list[Chunk]:
    """Cut each page into chunks of at most `chunk_size` characters that share about `overlap` characters.

    Cuts fall between paragraphs where they can, else lines, sentences, words. No chunk crosses a page, so
    each has one page to cite. Raises ValueError on sizes that can't work.
    """
    check_sizes(chunk_size, overlap)
    chunks = []
    for document in documents:
        for start, end in split_text(document.text, chunk_size, overlap):
            text = document.text[start:end]
            chunks.append(
                Chunk(
                    text=text,
                    file=document.file,
                    page=document.page,
                    start=start,
                    end=end,
                    id=chunk_id(document.file, document.page, start, text),
                    page_label=document.page_label,
                )
            )
    return chunks


def check_sizes(chunk_size: int, overlap: int) -> None:
    """Raise ValueError, with the numbers, if no text can be cut with these sizes."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1 character.")
    if not 0 <= overlap < chunk_size:
        raise ValueError(
            f"overlap is {overlap} and chunk_size {chunk_size}: overlap must be from 0 to {chunk_size - 1}."
        )


def chunk_id(file: str, page: int, start: int, text: str) -> str:
    """Return 16 hexadecimal digits that name a chunk by where it stands and what it says."""
    return hashlib.sha256("\0".join((file, str(page), str(start), text)).encode()).hexdigest()[:16]


def split_text(text: str, chunk_size: int, overlap: int) -> list[Span]:
    """Return the (start, end) of each chunk of `text`, white space trimmed at both ends.

    The algorithm of LangChain's RecursiveCharacterTextSplitter with `SEPARATORS` kept at the end of the piece
    before them, on offsets instead of strings. Where only white space sets two chunks apart, it gives the same
    chunk twice; here it stands once.
    """
    spans = (_trim(text, span) for span in _split(text, (0, len(text)), SEPARATORS, chunk_size, overlap))
    return list(dict.fromkeys(span for span in spans if span[0] < span[1]))


def _split(text: str, span: Span, separators: tuple[str, ...], size: int, overlap: int) -> Iterator[Span]:
    """Yield chunks of text[span]: cut at the best separator there is, and long pieces at the next best."""
    start, end = span
    usable = [i for i, separator in enumerate(separators) if text.find(separator, start, end) >= 0]
    if not usable:
        yield from _cut_anywhere(start, end, size, overlap)
        return
    separator, finer = separators[usable[0]], separators[usable[0] + 1 :]
    short: list[Span] = []
    for piece in _pieces(text, span, separator):
        if piece[1] - piece[0] < size:
            short.append(piece)
            continue
        yield from _merge(text, short, size, overlap)
        short = []
        yield from _split(text, piece, finer, size, overlap)
    yield from _merge(text, short, size, overlap)


def _pieces(text: str, span: Span, separator: str) -> Iterator[Span]:
    start, end = span
    while start < end:
        found = text.find(separator, start, end)
        cut = end if found < 0 else found + len(separator)
        yield start, cut
        start = cut


def _merge(text: str, pieces: list[Span], size: int, overlap: int) -> Iterator[Span]:
    """Join neighbouring pieces into chunks; each chunk starts with the last pieces of the one before."""
    window: deque[Span] = deque()
    for piece in pieces:
        if window and piece[1] - window[0][0] > size:
            yield window[0][0], window[-1][1]
            while window and (window[-1][1] - window[0][0] > overlap or piece[1] - window[0][0] > size):
                window.popleft()
        window.append(piece)
    if window:
        yield window[0][0], window[-1][1]


def _cut_anywhere(start: int, end: int, size: int, overlap: int) -> Iterator[Span]:
    while end - start > size:
        yield start, start + size
        start += size - overlap
    yield start, end


def _trim(text: str, span: Span) -> Span:
    piece = text[span[0] : span[1]]
    start = span[0] + len(piece) - len(piece.lstrip())
    return start, start + len(piece.strip())


def chunks_at(chunks: list[Chunk], file: str, page: int, start: int, end: int) -> list[Chunk]:
    """Return the chunks that hold the whole of text[start:end] of one page."""
    return [c for c in chunks if (c.file, c.page) == (file, page) and c.start <= start and end <= c.end]


def printable(name: object) -> str:
    """Return a file name as one line: control characters, such as a newline, are escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(name))
