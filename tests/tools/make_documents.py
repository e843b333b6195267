"""Print the sample documents: tests/tools/documents/*.md become PDF and TXT in mis_documentos/.

    make_documents.py                 all of them
    make_documents.py --only NAME     the source NAME.md alone
    make_documents.py --check         print nothing; exit 1 if mis_documentos/ is out of date

The same source gives the same bytes on every machine, so the results can be kept in git.
"""

import argparse
import html
import io
import itertools
import re
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from reportlab import platypus
from reportlab.lib.colors import HexColor
from reportlab.lib.enums import TA_JUSTIFY, TA_LEFT
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.pdfbase.pdfmetrics import stringWidth

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "tools" / "documents"
OUTPUT = ROOT / "mis_documentos"
AUTHOR = "Nebrán Lights and Ferries Cooperative"

HEADER = {  # each key, and what its value must look like
    "output": r"\w[\w.-]*\.(pdf|txt)",
    "title": r".+",
    "language": r"en|es",
    "layout": r"one-column|two-columns",
    "encoding": r"utf-8|latin-1",
}
DEFAULTS = {"layout": "one-column", "encoding": "utf-8"}
STARTS = {"# ": "title", "## ": "heading", "- ": "item", "|": "table"}
BREAKS = {"===front===": "front", "===page===": "page"}
UNDERLINES = {"title": "=", "heading": "-"}
TXT_WIDTH = 90

INK, RULE = HexColor("#1b2a38"), HexColor("#8b98a3")
TOP, BOTTOM, FOOTER, GUTTER = 84, 96, 58, 28  # points, as all lengths below
TABLE_SIZE, CELL_GAP = 9.5, 12
SMALL_TABLE = 170  # a table no higher than this is kept whole
HEADING_ROOM, TABLE_ROOM = 95, 230  # a heading and three lines; a heading and a small table


class SourceError(Exception):
    """A source that cannot be printed; the message is one sentence for its author."""


@dataclass
class Block:
    """One piece of a document: a heading, a paragraph, a list item, a table or a break."""

    kind: str
    text: str = ""
    rows: list[list[str]] = field(default_factory=list)


def read_source(path: Path) -> tuple[dict[str, str], list[Block]]:
    """Parse a source into its header and its blocks, or say where it is wrong."""
    try:
        lines = path.read_bytes().decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path.name} is not UTF-8 (at byte {error.start}).") from None
    if lines[0] != "---" or "---" not in lines[1:]:
        raise SourceError(f"{path.name} must begin with a header between two --- lines.")
    end = lines.index("---", 1)
    header = read_header(path.name, lines[1:end])
    is_pdf = header["output"].endswith(".pdf")
    # Times-Roman is written with the WinAnsiEncoding of PDF, which is code page 1252. A "•" in it
    # would come out as U+007F when the text is extracted.
    codec, target = ("cp1252", "Times-Roman") if is_pdf else (header["encoding"],) * 2
    for number, line in enumerate(lines, 1):
        for char in line:
            known = char.encode(codec, "ignore") and (char.isprintable() or char == "\xa0")
            if not known or (is_pdf and char == "•"):
                place = f"{path.name}, line {number}"
                raise SourceError(f"{place}: {target} cannot show {char!r} (U+{ord(char):04X}).")
    blocks = read_blocks(path.name, lines[end + 1 :], first_line=end + 2)
    kinds = [block.kind for block in blocks]
    if kinds.count("title") != 1 or kinds[0] != "title":
        raise SourceError(f"{path.name}: the text must begin with its only '# ' title.")
    if kinds.count("front") > 1:
        raise SourceError(f"{path.name}: ===front=== may stand only once.")
    if not is_pdf and (header["layout"] == "two-columns" or {"front", "page"} & set(kinds)):
        raise SourceError(f"{path.name}: only a PDF has columns, ===page=== and ===front===.")
    return header, blocks


def read_header(name: str, lines: list[str]) -> dict[str, str]:
    """Parse the `key: value` lines; a remark may follow two spaces and a #."""
    header = {}
    for number, line in enumerate(lines, 2):
        key, _, value = (part.strip() for part in re.sub(r"\s{2,}#.*", "", line).partition(":"))
        if key not in HEADER or key in header:
            keys = ", ".join(HEADER)
            raise SourceError(f"{name}, line {number}: {key!r} is not one of {keys}, or not new.")
        if not re.fullmatch(HEADER[key], value):
            raise SourceError(f"{name}, line {number}: {key} cannot be {value!r}.")
        header[key] = value
    header = DEFAULTS | header
    if missing := HEADER.keys() - header.keys():
        raise SourceError(f"{name}: the header lacks {', '.join(sorted(missing))}.")
    return header


def read_blocks(name: str, lines: list[str], first_line: int) -> list[Block]:
    """Cut the body into blocks; a line that starts nothing new continues the block before it."""
    blocks = [Block("")]  # an empty block stands for a blank line and is dropped at the end
    for number, line in enumerate(map(str.strip, lines), first_line):
        last, start = blocks[-1], next((start for start in STARTS if line.startswith(start)), "")
        if line in BREAKS or not line:
            blocks.append(Block(BREAKS.get(line, "")))
        elif line.startswith(("#", "===")) and not start:
            raise SourceError(f"{name}, line {number}: {line!r} is no heading and no break.")
        elif start == "|":
            row = [cell.strip() for cell in line.strip("|").split("|")]
            if last.kind != "table":
                blocks.append(Block("table", rows=[row]))
            elif len(row) != len(last.rows[0]):
                raise SourceError(f"{name}, line {number}: the row has more or fewer cells.")
            elif len(last.rows) > 1 or set(line) - set("|-: "):
                last.rows.append(row)
            else:
                last.rows.append([])  # |---|, the mark that the row before it is the head
        elif start or last.kind not in ("text", "item"):
            blocks.append(Block(STARTS.get(start, "text"), line.removeprefix(start).strip()))
        else:
            last.text += " " + line
    for block in blocks:
        if block.kind == "table" and ([] not in block.rows[1:2] or len(block.rows) < 3):
            raise SourceError(f"{name}: the table {block.rows[0]} needs a |---| line and rows.")
        block.rows = [row for row in block.rows if row]
    return [block for block in blocks if block.kind]


def render_txt(header: dict[str, str], blocks: list[Block]) -> bytes:
    """Print a document as plain text in the encoding of its header."""
    text, before = "", "item"
    for block in blocks:
        if block.kind == "table":
            widths = [max(map(len, column)) for column in zip(*block.rows, strict=True)]
            rows = [block.rows[0], ["-" * width for width in widths], *block.rows[1:]]
            padded = ([f"{c:{w}}" for c, w in zip(row, widths, strict=True)] for row in rows)
            part = "\n".join("  ".join(row).rstrip() for row in padded)
        elif block.kind in UNDERLINES:
            part = f"{block.text}\n{UNDERLINES[block.kind] * len(block.text)}"
        else:
            mark = "- " if block.kind == "item" else ""
            # A dash stays with the word before it: first on a line it would look like the mark
            # of a list item.
            part = mark + block.text.replace(" - ", "\0- ")
            wrapper = textwrap.TextWrapper(TXT_WIDTH, subsequent_indent=" " * len(mark))
            wrapper.break_long_words = wrapper.break_on_hyphens = False
            part = wrapper.fill(part).replace("\0", " ")
        text += ("\n" if block.kind == before == "item" else "\n\n") + part
        before = block.kind
    return (text.lstrip("\n") + "\n").encode(header["encoding"])


class Paper(platypus.BaseDocTemplate):
    """A PDF with its frames, its running footer and its page numbers."""

    def __init__(self, header: dict[str, str], blocks: list[Block]):
        self.stream, self.footer = io.BytesIO(), header["title"]
        names = {"title": header["title"], "author": AUTHOR, "lang": header["language"]}
        # No compression: what zlib makes differs between its versions, plain pages never do.
        super().__init__(self.stream, pagesize=A4, invariant=1, pageCompression=0, **names)
        columns = 2 if header["layout"] == "two-columns" else 1
        self.margin = 72 if columns == 2 else 98
        full_width = A4[0] - 2 * self.margin
        self.column_width = (full_width - GUTTER * (columns - 1)) / columns
        self.styles = make_styles(columns)
        self.in_front, self.front_pages = any(block.kind == "front" for block in blocks), 0

        # The title has a frame of its own, over all columns.
        title = platypus.Paragraph(html.escape(blocks[0].text, quote=False), self.styles["title"])
        rule = platypus.HRFlowable("100%", 0.6, color=RULE, spaceBefore=0, spaceAfter=0)
        rest, title_height = A4[1] - TOP - BOTTOM, title.wrap(full_width, A4[1])[1] + 28
        offsets = [self.margin + number * (self.column_width + GUTTER) for number in range(columns)]

        def column_frames(height: float) -> list[platypus.Frame]:
            sizes = (BOTTOM, self.column_width, height, 0, 0, 0, 0)
            return [platypus.Frame(offset, *sizes) for offset in offsets]

        title_bottom = A4[1] - TOP - title_height
        head = platypus.Frame(self.margin, title_bottom, full_width, title_height, 0, 0, 0, 0)
        for name, frames in (
            ("first", [head, *column_frames(rest - title_height)]),
            ("later", column_frames(rest)),
        ):
            # Drawn at the end of its page, the footer is also read there when text is extracted.
            template = platypus.PageTemplate(name, frames, onPageEnd=self.draw_footer)
            self.addPageTemplates(template)
        self.story = [platypus.NextPageTemplate("later"), title, rule, platypus.FrameBreak()]
        for block, after in itertools.pairwise([*blocks[1:], Block("end")]):
            self.story += self.flowables(block, after.kind)

    def flowables(self, block: Block, after: str) -> list[platypus.Flowable]:
        """A block, before one of the kind `after`, as platypus wants it."""
        if block.kind == "page":
            return [platypus.PageBreak()]
        if block.kind == "front":
            return [platypus.PageBreak(), platypus.ActionFlowable(("front_end",))]
        if block.kind == "table":
            table = make_table(block.rows, self.column_width, self.styles)
            height = table.wrap(self.column_width, A4[1])[1]
            room = height + table.getSpaceBefore() if height < SMALL_TABLE else 0
            return [platypus.CondPageBreak(room), table]
        style, bullet = self.styles[block.kind], "•" if block.kind == "item" else None
        part = platypus.Paragraph(html.escape(block.text, quote=False), style, bulletText=bullet)
        if block.kind != "heading":
            return [part]
        # Not keepWithNext: it would move the whole next paragraph, or table, to the next page.
        return [platypus.CondPageBreak(TABLE_ROOM if after == "table" else HEADING_ROOM), part]

    def handle_front_end(self) -> None:
        """Called by platypus on the first page after ===front===: number anew from here."""
        self.in_front, self.front_pages = False, self.page - 1
        self.canv.addPageLabel(0, "ROMAN_LOWER", 1)
        self.canv.addPageLabel(self.front_pages, "ARABIC", 1)

    def draw_footer(self, canvas, _document) -> None:
        """The title of the document and the number of the page, under a thin rule."""
        number = roman(self.page) if self.in_front else str(self.page - self.front_pages)
        canvas.setStrokeColor(RULE)
        canvas.setLineWidth(0.4)
        canvas.line(self.margin, FOOTER + 14, A4[0] - self.margin, FOOTER + 14)
        canvas.setFillColor(INK)
        canvas.setFont("Times-Italic", 9)
        canvas.drawString(self.margin, FOOTER, self.footer)
        canvas.setFont("Times-Roman", 9)
        canvas.drawRightString(A4[0] - self.margin, FOOTER, number)


def roman(number: int) -> str:
    """A page number below 40 in lower-case Roman numerals."""
    ones = ("", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix")
    return "x" * (number // 10) + ones[number % 10]


def make_styles(columns: int) -> dict[str, ParagraphStyle]:
    """The paragraph styles; narrow columns are set ragged, as justifying would tear them open."""
    lead, align = (17.5, TA_JUSTIFY) if columns == 1 else (15.5, TA_LEFT)
    whole = {"splitLongWords": 0, "allowWidows": 0, "allowOrphans": 0, "spaceBefore": lead / 2}
    size = {"fontName": "Times-Roman", "fontSize": 11, "leading": lead}
    text = ParagraphStyle("text", alignment=align, **size, **whole, spaceAfter=lead / 2)
    bold = {"parent": text, "fontName": "Times-Bold", "textColor": INK, "alignment": TA_LEFT}
    small = {"fontSize": TABLE_SIZE, "leading": 12.5, "spaceBefore": 0, "spaceAfter": 0}
    indents = {"leftIndent": 16, "bulletIndent": 4, "bulletFontName": "Symbol"}
    return {
        "text": text,
        "item": ParagraphStyle("item", text, spaceBefore=0, spaceAfter=lead / 4, **indents),
        "title": ParagraphStyle("title", **bold | {"fontSize": 24, "leading": 29, "spaceAfter": 8}),
        "heading": ParagraphStyle("heading", **bold, fontSize=14, spaceBefore=8),
        "cell": ParagraphStyle("cell", text, alignment=TA_LEFT, **small),
        "head cell": ParagraphStyle("head cell", **bold | small),
    }


class Cell(platypus.Paragraph):
    """A table cell."""

    def draw(self) -> None:
        """Draw the cell; one line without the line feed that platypus puts after every line.

        Nobody sees the line feed, but text extraction would give every cell a line of its own.
        """
        if len(self.blPara.lines) != 1:
            super().draw()
            return
        style, text = self.style, " ".join(self.blPara.lines[0][1])
        pen = self.canv.beginText(0, self.height - self.style.fontSize)
        pen.setFont(style.fontName, style.fontSize)
        pen.setFillColor(style.textColor)
        pen.textOut(text)
        self.canv.drawText(pen)


def make_table(rows: list[list[str]], width: float, styles: dict[str, ParagraphStyle]):
    """A table as wide as its column, with wrapping cells and its head on every page."""
    columns = list(zip(*rows, strict=True))

    def widest(pieces: str) -> list[float]:
        found = [[p for cell in column for p in re.findall(pieces, cell)] for column in columns]
        bold = [[stringWidth(p, "Times-Bold", TABLE_SIZE) for p in column] for column in found]
        return [CELL_GAP + max(column, default=0) for column in bold]

    # Every column gets its longest word; beyond that, the widest columns give way first.
    words, wishes, most = widest(r"\S+"), widest(r".+"), round(width)
    if sum(words) > width:
        raise SourceError(f"the table {rows[0]} is too wide for its column.")
    widths = wishes
    while sum(widths) > width:
        widths = [max(word, min(wish, most)) for word, wish in zip(words, wishes, strict=True)]
        most -= 1
    widths = [column * width / sum(widths) for column in widths]
    looks = [styles["head cell"]] + [styles["cell"]] * (len(rows) - 1)
    cells = [
        [Cell(html.escape(cell, quote=False), look) for cell in row] for look, row in zip(looks, rows, strict=True)
    ]
    table = platypus.Table(cells, widths, repeatRows=1, spaceBefore=4, spaceAfter=14)
    everywhere = ((0, 0), (-1, -1))
    table.setStyle(
        [
            ("VALIGN", *everywhere, "TOP"),
            ("LEFTPADDING", *everywhere, 0),
            ("RIGHTPADDING", *everywhere, CELL_GAP - 1),
            ("TOPPADDING", *everywhere, 2),
            ("BOTTOMPADDING", *everywhere, 5),
            ("LINEBELOW", *everywhere, 0.3, RULE),
            ("LINEABOVE", (0, 0), (-1, 0), 0.8, INK),
            ("LINEBELOW", (0, 0), (-1, 0), 0.6, INK),
        ]
    )
    return table


def render(path: Path) -> tuple[str, bytes]:
    """Print one source: the name of the file, and its bytes."""
    header, blocks = read_source(path)
    if header["output"].endswith(".txt"):
        return header["output"], render_txt(header, blocks)
    try:
        paper = Paper(header, blocks)
        paper.build(paper.story)
    except SourceError as error:
        raise SourceError(f"{path.name}: {error}") from None
    return header["output"], paper.stream.getvalue()


def render_folder(sources: Path, output: Path, only: str | None = None) -> list[str]:
    """Print the sources of a folder into another one and return the names of the files.

    Nothing is written before every source has been printed, and nothing is ever removed.
    """
    made: dict[str, bytes] = {}
    for path in sorted(sources.glob("*.md")):
        if only in (None, path.stem):
            name, data = render(path)
            if name in made:
                raise SourceError(f"{path.name}: another source already makes {name}.")
            made[name] = data
    if not made:
        raise SourceError(f"There is no {only or '*'}.md in {sources}.")
    output.mkdir(parents=True, exist_ok=True)
    for name, data in made.items():
        (output / name).write_bytes(data)
    return list(made)


def differing(sources: Path, output: Path, only: str | None = None) -> list[str]:
    """The files of the output folder that are missing or not what their sources give now."""
    with tempfile.TemporaryDirectory() as folder:
        names = render_folder(sources, fresh := Path(folder), only)
        there = {name for name in names if (output / name).is_file()}
        same = {n for n in there if (output / n).read_bytes() == (fresh / n).read_bytes()}
    return [name for name in names if name not in same]


def main() -> int:
    """Read the command line, print or compare, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="the source NAME.md alone")
    parser.add_argument("--check", action="store_true", help="print nothing, compare")
    options = parser.parse_args()
    work, remark = (differing, " is missing or out of date") if options.check else (render_folder, "")
    try:
        names = work(SOURCES, OUTPUT, options.only)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    for name in names:
        print(f"{OUTPUT.name}/{name}{remark}")
    return 1 if options.check and names else 0


if __name__ == "__main__":
    sys.exit(main())
