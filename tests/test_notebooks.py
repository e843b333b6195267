"""The rules of a notebook, checked without running it: one test a rule, run once a notebook.

What fails names the notebook and the cell: its position, counted from 0, and its id. The last part breaks a good
notebook in one way after another and checks that the rule notices.
"""

import ast
import datetime
import importlib.util
import io
import json
import re
import tokenize
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
import pytest
from nbformat import reader
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbformat.validator import iter_validate

_spec = importlib.util.spec_from_file_location(
    "setup_cell", Path(__file__).resolve().parent / "tools" / "setup_cell.py"
)
setup_cell = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup_cell)

LINES, MOST_LINES, COLUMNS = 20, 30, 79
MOST_BYTES = 500_000
EXEMPT = {"nbval-ignore-output", "nbval-skip"}
TAGS = EXEMPT | {"setup", "parameters", "raises-exception"}
NEEDS = {"gpu", "ollama"}

# A folder that only one machine has; not part of an address on the web.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~-])/(?:home|root|tmp|work|Users|usr|opt|var|mnt|content|private)/\w|\b[A-Z]:\\\w"
)
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")  # of an object in memory
PIN = re.compile(r"[A-Za-z][\w.-]*(?:\[[\w,-]+\])? ?={2,3} ?v?\d[\w.]*")
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:href|src)=[\"']([^\"']+)|^\s*\[[^\]]+\]:\s*(\S+)", re.MULTILINE)


@dataclass
class Notebook:
    """A notebook on disk, read when a test first asks for it."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def node(self) -> nbformat.NotebookNode:
        return reader.reads(self.text)  # nbformat.reads would mend double ids in silence

    @property
    def cells(self) -> list:
        return self.node.cells

    @property
    def name(self) -> str:
        return self.path.relative_to(setup_cell.ROOT / "notebooks").as_posix()

    @property
    def is_solution(self) -> bool:
        return self.path.parent.name == "solutions"

    @property
    def number(self) -> str:
        """'03', or 'A1' of an appendix."""
        return self.path.name.split("_")[0]

    @property
    def code(self) -> list[tuple[int, nbformat.NotebookNode]]:
        return [(i, cell) for i, cell in enumerate(self.cells) if cell.cell_type == "code"]

    @property
    def markdown(self) -> list[tuple[int, nbformat.NotebookNode]]:
        return [(i, cell) for i, cell in enumerate(self.cells) if cell.cell_type == "markdown"]

    @property
    def opening(self) -> str:
        """The text before the first code cell."""
        first = self.code[0][0] if self.code else len(self.cells)
        return "\n\n".join(cell.source for cell in self.cells[:first])

    def headings(self) -> list[tuple[int, int, str]]:
        """(cell, level, text) of each heading."""
        return [
            (i, len(marks), text.strip())
            for i, cell in self.markdown
            for marks, text in re.findall(r"^ {0,3}(#{1,6}) +(.+)$", without_code(cell.source), re.MULTILINE)
        ]

    def after_heading(self, text: str) -> str:
        """The markdown from the heading `text`, of level 2, to the end of the notebook; '' without one."""
        for i, cell in self.markdown:
            match = re.search(rf"^## +{text}\s*$", cell.source, re.MULTILINE)
            if match:
                return "\n\n".join([cell.source[match.start() :]] + [c.source for j, c in self.markdown if j > i])
        return ""

    def sibling(self, step: int) -> Path | None:
        """The numbered notebook `step` places on, if there is one."""
        if not self.number.isdigit():
            return None
        return next(self.path.parent.glob(f"{int(self.number) + step:02d}_*.ipynb"), None)

    def at(self, index: int) -> str:
        return f"{self.name}, cell {index} ({self.cells[index].get('id', 'no id')})"


NOTEBOOKS = [Notebook(path) for path in setup_cell.notebooks()]
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)


def none_of(faults: Iterable[str]) -> None:
    """Fail with every fault on a line of its own."""
    __tracebackhide__ = True
    faults = list(faults)
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


def tags(cell: nbformat.NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def tree(cell: nbformat.NotebookNode) -> ast.Module:
    """The syntax tree of a cell; an empty one where it is no Python (a test of its own says so)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            return ast.parse(cell.source)
        except SyntaxError:
            return ast.Module([], [])


def without_code(markdown: str) -> str:
    """Markdown without its code blocks and code spans."""
    markdown = re.sub(r"^(```|~~~).*?^\1[^\n]*$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", markdown)


def strings_and_comments(source: str) -> str:
    """What a cell of code says in words."""
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return source
    return "\n".join(token.string for token in tokens if token.type in kinds)


def output_texts(cell: nbformat.NotebookNode) -> Iterator[str]:
    """Everything in the outputs of a cell that is text."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield "\n".join(output.get("traceback", []))
        for kind, data in output.get("data", {}).items():
            if not kind.startswith("image/") or kind == "image/svg+xml":
                yield data if isinstance(data, str) else json.dumps(data)


def links(markdown: str) -> list[str]:
    return [next(filter(None, found)) for found in LINK.findall(without_code(markdown))]


def linked_files(notebook: Notebook, markdown: str) -> list[Path]:
    """The files in this repository that `markdown` links to, the notebook's own badge left out."""
    own = f"{setup_cell.REPOSITORY}/blob/main/"
    colab = own.replace("https://github.com/", "https://colab.research.google.com/github/")
    found = []
    for link in links(markdown.replace(setup_cell.badge(notebook.path), "")):
        target = link.split("#")[0]
        if target.startswith((own, colab)):
            found.append(setup_cell.ROOT / target.removeprefix(own).removeprefix(colab))
        elif target and not re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE):
            found.append((notebook.path.parent / target).resolve())
    return found


# 1. Names, links, the end


def faults_of_names(folder: Path) -> Iterator[str]:
    """What is wrong with the set of notebooks in `folder`: names, numbers, solutions, entries in the table."""
    names = sorted(path.name for path in folder.glob("*.ipynb"))
    for name in names:
        if not re.fullmatch(r"(\d\d|A[1-9])_[a-z0-9]+(_[a-z0-9]+)*\.ipynb", name):
            yield f"{name}: a notebook is named NN_topic.ipynb, an appendix A1_topic.ipynb."
    for kind, first in ((r"\d\d", 0), ("A[1-9]", 1)):
        numbers = [int(name.lstrip("A").split("_")[0]) for name in names if re.match(f"{kind}_", name)]
        if numbers != list(range(first, first + len(numbers))):
            yield f"The numbers {numbers} of notebooks/ are not contiguous from {first}."
    for path in sorted((folder / "solutions").glob("*.ipynb")):
        if not re.fullmatch(r"(\d\d|A[1-9])_solutions\.ipynb", path.name):
            yield f"solutions/{path.name}: solutions are named NN_solutions.ipynb."
        elif not list(folder.glob(f"{path.name.split('_')[0]}_*.ipynb")):
            yield f"solutions/{path.name}: there is no notebook of this number."
    for name in table():
        if not (folder / f"{name}.ipynb").exists():
            yield f"tests/notebooks.toml has [{name!r}], but notebooks/{name}.ipynb does not exist."


def test_names_are_contiguous():
    none_of(faults_of_names(setup_cell.ROOT / "notebooks"))


@each_notebook
def test_links_lead_to_files(notebook):
    faults = []
    for i, cell in notebook.markdown:
        for path in linked_files(notebook, cell.source):
            if not (path.exists() and path.is_relative_to(setup_cell.ROOT)):
                faults.append(f"{notebook.at(i)} links to {path.name}, which does not exist.")
        anchors = {text.replace(" ", "-") for _, _, text in notebook.headings()}
        for link in links(cell.source):
            if link.startswith("#") and link[1:] not in anchors:
                faults.append(f"{notebook.at(i)} links to the heading {link}, which does not exist.")
    none_of(faults)


@each_notebook
def test_ends_with_summary_exercises_and_a_link_on(notebook):
    if notebook.is_solution:
        return
    exercises = notebook.after_heading("Exercises")
    solutions = notebook.path.parent / "solutions" / f"{notebook.number}_solutions.ipynb"
    following = notebook.sibling(+1)
    ends_on = {path for path in linked_files(notebook, exercises) if path.suffix == ".ipynb"}
    faults = []
    if not exercises or "\n## Exercises" not in notebook.after_heading("Summary"):
        faults.append(f"{notebook.name} does not end with '## Summary' and then '## Exercises'.")
    if not 3 <= number_of_exercises(exercises) <= 5:
        faults.append(
            f"{notebook.name} has {number_of_exercises(exercises)} exercises: 3 to 5 as '1.', '2.' or '### '."
        )
    if not solutions.exists():
        faults.append(f"{notebook.name} has no solutions/{solutions.name}.")
    elif solutions not in linked_files(notebook, "\n\n".join(cell.source for _, cell in notebook.markdown)):
        faults.append(f"{notebook.name} does not link to its solutions.")
    if not ends_on - {solutions} or (following and following not in ends_on):
        faults.append(
            f"{notebook.name} does not link on to {following.name if following else 'a notebook'} at its end."
        )
    none_of(faults)


def number_of_exercises(text: str) -> int:
    """How many exercises the part '## Exercises' has: its headings, else its numbered points."""
    text = re.split(r"^## (?!Exercises)", text, maxsplit=1, flags=re.MULTILINE)[0]
    headings = re.findall(r"^#{3,} ", text, re.MULTILINE)
    return len(headings or re.findall(r"^(?:\*\*)?(?:Exercise )?\d+[.:)]", text, re.MULTILINE))


@each_notebook
def test_solutions_solve_every_exercise(notebook):
    if not notebook.is_solution:
        return
    paths = notebook.path.parent.parent.glob(f"{notebook.number}_*.ipynb")
    asked = sum(number_of_exercises(Notebook(path).after_heading("Exercises")) for path in paths)
    solved = sum(level >= 2 for _, level, _ in notebook.headings())
    none_of([f"{notebook.name} has {solved} headings for {asked} exercises."] if solved < asked else [])


# 2. The opening


@each_notebook
def test_one_h1_at_the_top(notebook):
    titles = [i for i, level, _ in notebook.headings() if level == 1]
    for i, cell in notebook.markdown:
        titles += [i] * len(re.findall(r"^[^\n]+\n=+\s*$|<h1", without_code(cell.source), re.MULTILINE))
    faults = [f"{notebook.at(i)} has another H1." for i in titles[1:]]
    if not notebook.cells or not notebook.cells[0].source.startswith("# "):
        faults.append(f"{notebook.name}, cell 0: the first line is not '# Title'.")
    none_of(faults)


@each_notebook
def test_badge_opens_this_notebook(notebook):
    wanted = setup_cell.badge(notebook.path)
    faults = []
    if wanted not in notebook.opening.split("\n"):
        faults.append(f"{notebook.name}, opening: no line is {wanted} (python tests/tools/setup_cell.py writes it).")
    for i, cell in notebook.markdown:
        if setup_cell.BADGE in cell.source.replace(wanted, "", 1 if wanted in notebook.opening else 0):
            faults.append(f"{notebook.at(i)} has another badge.")
    none_of(faults)


@each_notebook
def test_opening_links_back_and_on(notebook):
    linked = linked_files(notebook, notebook.opening)
    if notebook.is_solution:
        wanted = list(notebook.path.parent.parent.glob(f"{notebook.number}_*.ipynb"))
    else:
        wanted = [path for path in (notebook.sibling(-1), notebook.sibling(+1)) if path]
    none_of(f"{notebook.name}, opening: no link to {path.name}." for path in wanted if path not in linked)


@each_notebook
def test_opening_says_what_is_learnt_needed_and_how_long(notebook):
    if re.search(r"\bTT\b", notebook.opening):
        pytest.fail(f"{notebook.name}, opening: TT stands for a time that `make run` measures: write it in.", False)
    if notebook.is_solution:
        return
    faults = []
    points = points_after("You will be able to", notebook.opening)
    if not 3 <= points <= 5:
        faults.append(f"{notebook.name}, opening: {points} points under 'You will be able to', not 3 to 5.")
    if not re.search(r"\byou need\b", notebook.opening, re.IGNORECASE):
        faults.append(f"{notebook.name}, opening: it does not say 'You need'.")
    elif "download" not in notebook.opening.lower():
        faults.append(f"{notebook.name}, opening: it does not say how large the download is, or that there is none.")
    takes = re.search(r"\bit takes\b.*?(?=\n\s*\n|\Z)", notebook.opening, re.IGNORECASE | re.DOTALL)
    if not takes:
        faults.append(f"{notebook.name}, opening: it does not say 'It takes'.")
    elif not re.search(r"\d+ ?(?:s|seconds|min|minutes)\b", takes.group()):
        faults.append(f"{notebook.name}, opening: 'It takes' gives no time ('30 seconds'): `make run` measures it.")
    none_of(faults)


def points_after(phrase: str, text: str) -> int:
    """How many points the list after `phrase` has."""
    count = 0
    for line in text.partition(phrase)[2].split("\n")[1:]:
        if re.match(r"(?:[-*+]|\d+[.)]) ", line):
            count += 1
        elif count and line.strip() and not line.startswith(" "):
            break
    return count


# 3. Setup, parameters, valid Python


@each_notebook
def test_setup_cell_is_the_generated_one(notebook):
    tagged = [i for i, cell in enumerate(notebook.cells) if "setup" in tags(cell)]
    if not notebook.code or tagged != [notebook.code[0][0]]:
        pytest.fail(f"{notebook.name}: the first code cell, and no other, is tagged 'setup' (tagged: {tagged}).", False)
    i, cell = notebook.code[0]
    if cell.source != setup_cell.SETUP:
        pytest.fail(f"{notebook.at(i)} is not the setup cell: run python tests/tools/setup_cell.py.", False)


@each_notebook
def test_parameters_follow_the_setup(notebook):
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in tags(cell)]
    second = [i for i, _ in notebook.code[1:2]]
    faults = []
    if not second or tagged != second:
        faults.append(
            f"{notebook.name}: the code cell after the setup, and no other, is tagged 'parameters' ({tagged})."
        )
    for i in tagged:
        for statement in tree(notebook.cells[i]).body:
            if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.ImportFrom):
                faults.append(f"{notebook.at(i)}, line {statement.lineno}: parameters are plain assignments.")
    none_of(faults)


@each_notebook
def test_code_is_valid_python(notebook):
    faults = []
    for i, cell in notebook.code:
        try:
            with warnings.catch_warnings():
                for kind in (SyntaxWarning, DeprecationWarning):  # an invalid escape is the latter in Python 3.11
                    warnings.simplefilter("error", kind)
                compile(cell.source, f"cell {i}", "exec")
        except SyntaxError as error:
            faults.append(f"{notebook.at(i)}, line {error.lineno}: {error.msg}.")
    none_of(faults)


@each_notebook
def test_only_the_setup_installs(notebook):
    faults = []
    for i, cell in notebook.code:
        if "setup" not in tags(cell) and re.search(r"\b(?:pip|conda|uv|apt-get)\b[\s\S]{0,40}\binstall\b", cell.source):
            faults.append(
                f"{notebook.at(i)} installs something: packages belong to requirements.txt and the setup cell."
            )
    none_of(faults)


# 4. Exact versions


@each_notebook
def test_no_version_is_pinned(notebook):
    faults = []
    for i, cell in enumerate(notebook.cells):
        words = strings_and_comments(cell.source) if cell.cell_type == "code" else cell.source
        faults += [
            f"{notebook.at(i)} pins {pin!r}: exact versions stand in requirements.lock." for pin in PIN.findall(words)
        ]
    none_of(faults)


PINNING = ("requirements.txt", "pyproject.toml", "environment.yml", "Makefile", "README.md")


@pytest.mark.parametrize("name", PINNING)
def test_versions_are_pinned_in_the_lock_alone(name):
    path = setup_cell.ROOT / name
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    none_of(f"{name}, line {n}: {PIN.search(line).group()!r}" for n, line in enumerate(lines, 1) if PIN.search(line))


# 5. Imports


@each_notebook
def test_helpers_are_imported_by_name(notebook):
    faults = []
    for i, cell in notebook.code:
        if "setup" in tags(cell):
            continue
        for node in ast.walk(tree(cell)):
            if isinstance(node, ast.ImportFrom) and any(name.name == "*" for name in node.names):
                faults.append(f"{notebook.at(i)}, line {node.lineno}: import *.")
            if isinstance(node, ast.Import) and any(name.name.split(".")[0] == "helpers" for name in node.names):
                faults.append(f"{notebook.at(i)}, line {node.lineno}: from helpers.x import y, by name.")
            if edits_the_path(node):
                faults.append(f"{notebook.at(i)}, line {node.lineno}: the import path is edited.")
    none_of(faults)


def edits_the_path(node: ast.AST) -> bool:
    """Whether `node` names sys.path or another way to it."""
    if isinstance(node, ast.Attribute):
        return node.attr == "addsitedir" or (node.attr == "path" and ast.unparse(node.value) == "sys")
    if isinstance(node, ast.ImportFrom):
        return node.module == "sys" and any(name.name == "path" for name in node.names)
    return isinstance(node, ast.Constant) and node.value == "PYTHONPATH"


def test_no_module_lies_beside_the_notebooks():
    none_of(
        f"{path.name} is a module: it belongs in helpers/." for path in (setup_cell.ROOT / "notebooks").rglob("*.py")
    )


# 6. The shape of cells


@each_notebook
def test_code_cells_are_short(notebook):
    faults, long = [], []
    for i, cell in notebook.code:
        lines = cell.source.split("\n")
        if len(lines) > LINES:
            long.append(notebook.at(i))
        if len(lines) > MOST_LINES:
            faults.append(f"{notebook.at(i)} has {len(lines)} lines, more than {MOST_LINES}.")
        for number, line in enumerate(lines, start=1):
            if len(line) > COLUMNS:
                faults.append(f"{notebook.at(i)}, line {number} has {len(line)} columns, more than {COLUMNS}.")
        if not cell.source.strip():
            faults.append(f"{notebook.at(i)} is empty.")
    if len(long) > 0.1 * len(notebook.code):
        faults.append(f"More than one code cell in ten has over {LINES} lines: {'; '.join(long)}.")
    none_of(faults)


@each_notebook
def test_words_go_before_code(notebook):
    kinds = [cell.cell_type for cell in notebook.cells]
    code = [i for i, _ in notebook.code]
    led = [i for i in code if i and kinds[i - 1] == "markdown"]
    faults = [f"{notebook.at(i)} is a raw cell." for i, kind in enumerate(kinds) if kind == "raw"]
    if len(notebook.markdown) < 0.8 * len(code):
        faults.append(
            f"{notebook.name} has {len(notebook.markdown)} markdown cells for {len(code)} code cells: under 0.8."
        )
    if len(led) < 0.8 * len(code):
        alone = "; ".join(notebook.at(i) for i in code if i not in led)
        faults.append(
            f"{notebook.name}: only {len(led)} of {len(code)} code cells are right after markdown, not {alone}."
        )
    for i in range(len(kinds) - 3):
        if set(kinds[i : i + 4]) == {"code"}:
            faults.append(f"{notebook.at(i)} begins more than three code cells in a row.")
    none_of(faults)


# 7. Outputs of one clean run


@each_notebook
def test_counts_run_from_one(notebook):
    faults = []
    for wanted, (i, cell) in enumerate(notebook.code, start=1):
        if cell.execution_count != wanted:
            faults.append(f"{notebook.at(i)} has the count {cell.execution_count}, not {wanted}: run all from the top.")
        for output in cell.outputs:
            if output.output_type == "execute_result" and output.execution_count != cell.execution_count:
                faults.append(f"{notebook.at(i)} has an output of another run ({output.execution_count}).")
    none_of(faults)


@each_notebook
def test_outputs_have_no_stderr_and_no_error(notebook):
    faults = []
    for i, cell in notebook.code:
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                faults.append(f"{notebook.at(i)} wrote to stderr: {output.text[:80]!r}.")
            if output.output_type == "error" and "raises-exception" not in tags(cell):
                faults.append(f"{notebook.at(i)} failed: {output.ename}.")
    none_of(faults)


@each_notebook
def test_format_and_metadata(notebook):
    node, faults = notebook.node, []
    if (node.nbformat, node.nbformat_minor) != (4, 5):
        faults.append(f"{notebook.name} has nbformat {node.nbformat}.{node.nbformat_minor}, not 4.5.")
    ids = [cell.get("id") for cell in notebook.cells]
    faults += [f"{notebook.at(i)} has the id of another cell." for i, name in enumerate(ids) if name in ids[:i]]
    faults += [f"{notebook.name} is not valid: {error.message[:200]}" for error in iter_validate(node)]
    if "widgets" in node.metadata:
        faults.append(f"{notebook.name} holds the state of widgets: delete metadata.widgets.")
    others = set(node.metadata) - {"kernelspec", "language_info", "widgets"}
    if others:
        faults.append(
            f"{notebook.name} has the metadata {', '.join(sorted(others))}: only kernelspec and language_info."
        )
    if node.metadata.get("kernelspec", {}).get("name") != "python3":
        faults.append(f"{notebook.name}: the kernel is not python3.")
    none_of(faults)


@each_notebook
def test_size(notebook):
    size = len(notebook.text.encode())
    none_of([f"{notebook.name} has {size:,} bytes, more than {MOST_BYTES:,}."] if size > MOST_BYTES else [])


# 8. Which outputs are compared


@each_notebook
def test_exemptions_are_few_and_followed_by_asserts(notebook):
    faults, exempt = [], []
    for place, (i, cell) in enumerate(notebook.code):
        if not tags(cell) & EXEMPT:
            continue
        exempt.append(notebook.at(i))
        following = [c for _, c in notebook.code[place + 1 : place + 2]]
        if not following or "nbval-skip" in tags(following[0]) or not asserts(following[0]):
            faults.append(f"{notebook.at(i)} is exempt, but the next code cell asserts nothing.")
    if len(exempt) > len(notebook.code) / 4:
        faults.append(f"{notebook.name}: more than one code cell in four is exempt: {'; '.join(exempt)}.")
    none_of(faults)


def asserts(cell: nbformat.NotebookNode) -> bool:
    """Whether the cell itself asserts, not only a function that it defines."""
    defined = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    statements = (node for top in tree(cell).body if not isinstance(top, defined) for node in ast.walk(top))
    return any(isinstance(node, ast.Assert) or "assert_" in name_called(node) for node in statements)


def name_called(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


@each_notebook
def test_tags_are_known_and_nothing_is_exempt_by_comment(notebook):
    faults = []
    for i, cell in enumerate(notebook.cells):
        unknown = tags(cell) - TAGS
        if unknown:
            faults.append(f"{notebook.at(i)} has the unknown tag {', '.join(sorted(unknown))}.")
        if cell.cell_type == "code" and re.search(r"#\s*(?:NBVAL_|PYTEST_VALIDATE)", cell.source):
            faults.append(f"{notebook.at(i)} is exempt by a comment: use a tag.")
    none_of(faults)


@each_notebook
def test_times_go_through_the_formatter(notebook):
    clocks = re.compile(r"\bperf_counter\b|\bmonotonic\b|\btime\.time\b|\btimeit\b|\.timings\b")
    timed = [i for i, cell in notebook.code if clocks.search(cell.source)]
    if timed and not any("format_seconds" in cell.source for _, cell in notebook.code):
        none_of([f"{notebook.at(timed[0])} takes a time: print it through helpers.settings.format_seconds."])


# 9. Nothing is skipped in silence


def table() -> dict[str, dict]:
    return tomllib.loads((setup_cell.ROOT / "tests" / "notebooks.toml").read_text(encoding="utf-8"))


@each_notebook
def test_listed_with_what_it_needs(notebook):
    name = notebook.name.removesuffix(".ipynb")
    entry = table().get(name)
    if entry is None:
        pytest.fail(f"{notebook.name} has no table [{name!r}] in tests/notebooks.toml.", False)
    faults = []
    if set(entry) != {"cells_needing", "last_run", "machine"}:
        faults.append(f"[{name!r}] has {', '.join(sorted(entry))}, not cells_needing, last_run and machine.")
    day = entry.get("last_run")
    if type(day) is not datetime.date or day > datetime.date.today() + datetime.timedelta(days=1):
        faults.append(f"[{name!r}]: last_run is {day!r}, not a day that has been.")
    if not str(entry.get("machine", "")).strip():
        faults.append(f"[{name!r}]: machine is empty.")
    needing = {row.get("id"): row.get("needs") for row in entry.get("cells_needing", [])}
    ids = {cell.get("id") for _, cell in notebook.code}
    for cell_id, needs in needing.items():
        if cell_id not in ids:
            faults.append(f"[{name!r}]: {notebook.name} has no code cell {cell_id!r}.")
        if needs not in NEEDS:
            faults.append(f"[{name!r}]: the cell {cell_id!r} needs {needs!r}, not one of {', '.join(sorted(NEEDS))}.")
    for i, cell in notebook.code:
        if "nbval-skip" in tags(cell) and cell.get("id") not in needing:
            faults.append(f"{notebook.at(i)} is skipped, but not in cells_needing of tests/notebooks.toml.")
    none_of(faults)


# Nothing of one machine


@each_notebook
def test_nothing_of_one_machine(notebook):
    faults = []
    for i, cell in enumerate(notebook.cells):
        texts = [] if "setup" in tags(cell) else [("source", cell.source)]  # on Colab, /content is the place
        if cell.cell_type == "code":
            texts += [("output", text) for text in output_texts(cell)]
        for where, text in texts:
            for found in MACHINE_PATH.finditer(text):
                faults.append(f"{notebook.at(i)}, {where}: the path {text[found.start() : found.end() + 20]!r}.")
            if where == "output":
                faults += [f"{notebook.at(i)}, output: the address {found}." for found in ADDRESS.findall(text)]
    none_of(faults)


# The rules bite: a good notebook passes each of them, and one that is broken in one way does not.


def good_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook that keeps every rule, as if it were the first of two."""
    points = "\n".join(f"- do thing {number}" for number in range(3))
    opening = (
        f"# Title\n\n{setup_cell.badge(path)}\n\n[Next](01_next.ipynb)\n\n**You will be able to**\n\n{points}\n\n"
        "**You need** nothing. Download: none.\n\n**It takes** about 30 seconds."
    )
    cells = [
        new_markdown_cell(opening),
        new_code_cell(setup_cell.SETUP, metadata={"tags": ["setup"]}),
        new_markdown_cell("## Numbers to change"),
        new_code_cell("SIZE = 3", metadata={"tags": ["parameters"]}),
        new_markdown_cell("## Idea"),
        new_code_cell("print(SIZE)", metadata={"tags": []}, outputs=[new_output("stream", text="3\n")]),
        new_markdown_cell("It differs from machine to machine."),
        new_code_cell("SIZE", metadata={"tags": ["nbval-ignore-output"]}),
        new_code_cell("assert SIZE == 3"),
        new_markdown_cell("## Summary\n\nDone."),
        new_markdown_cell(
            "## Exercises\n\n1. One.\n2. Two.\n3. Three.\n\n"
            "[Solutions](solutions/00_solutions.ipynb), [next](01_next.ipynb)"
        ),
    ]
    notebook = new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    notebook.nbformat_minor = 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"c{number:02d}"
    for count, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), start=1):
        cell.execution_count = count
    return notebook


@pytest.fixture
def family(tmp_path, monkeypatch) -> Path:
    """A repository of two notebooks, solutions and their table; the path of the first notebook."""
    monkeypatch.setattr(setup_cell, "ROOT", tmp_path)
    (tmp_path / "notebooks" / "solutions").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    first = tmp_path / "notebooks" / "00_good.ipynb"
    solutions = first.parent / "solutions" / "00_solutions.ipynb"
    entry = 'cells_needing = []\nlast_run = 2026-01-01\nmachine = "a laptop"\n'
    names = ("00_good", "solutions/00_solutions")
    (tmp_path / "tests" / "notebooks.toml").write_text("".join(f'["{name}"]\n{entry}' for name in names))
    nbformat.write(good_notebook(first), first)
    nbformat.write(good_notebook(first), first.with_name("01_next.ipynb"))
    answers = good_notebook(first)
    answers.cells[0].source = f"# Solutions\n\n{setup_cell.badge(solutions)}\n\n[Back](../00_good.ipynb)"
    answers.cells[-1].source = "## Another way"
    nbformat.write(answers, solutions)
    return first


def put(index: int, **fields) -> Callable[[nbformat.NotebookNode], None]:
    """A way to break a notebook: fields of one cell take other values."""

    def breaking(node: nbformat.NotebookNode) -> None:
        for name, value in fields.items():
            if name == "tags":
                node.cells[index].metadata["tags"] = value
            else:
                node.cells[index][name] = value

    return breaking


def swap(index: int, old: str, new: str) -> Callable[[nbformat.NotebookNode], None]:
    """A way to break a notebook: a word of one cell is another."""

    def breaking(node: nbformat.NotebookNode) -> None:
        assert old in node.cells[index].source
        node.cells[index].source = node.cells[index].source.replace(old, new)

    return breaking


def prints(text: str, name: str = "stdout") -> Callable[[nbformat.NotebookNode], None]:
    return put(5, outputs=[new_output("stream", name=name, text=text)])


def four_in_a_row(node: nbformat.NotebookNode) -> None:
    node.cells[9:9] = [new_code_cell("SIZE", id=f"x{number}", execution_count=6) for number in range(2)]


def little_markdown(node: nbformat.NotebookNode) -> None:
    node.cells = [cell for i, cell in enumerate(node.cells) if i not in (2, 4, 6)]


BREAKAGES = [
    (test_links_lead_to_files, swap(4, "Idea", "Idea\n[x](04_none.ipynb)"), "cell 4 .* links to 04_none.ipynb"),
    (test_links_lead_to_files, swap(4, "Idea", "Idea\n![x](figures/none.png)"), "none.png"),
    (test_links_lead_to_files, swap(4, "Idea", "Idea\n[x](#Nowhere)"), "heading #Nowhere"),
    (test_links_lead_to_files, swap(4, "Idea", "Idea\n<a href='none.md'>x</a>"), "none.md"),
    (test_links_lead_to_files, swap(4, "Idea", f"Idea\n[x]({setup_cell.REPOSITORY}/blob/main/no.md)"), "no.md"),
    (test_ends_with_summary_exercises_and_a_link_on, swap(9, "## Summary", "## End"), "does not end with"),
    (test_ends_with_summary_exercises_and_a_link_on, swap(10, "3. Three.", ""), "2 exercises"),
    (test_ends_with_summary_exercises_and_a_link_on, swap(10, "](01_next", "](00_good"), "link on to 01_next"),
    (test_ends_with_summary_exercises_and_a_link_on, swap(10, "solutions/00_s", "00_s"), "link to its solutions"),
    (test_one_h1_at_the_top, swap(4, "## Idea", "# Idea"), "cell 4 .* another H1"),
    (test_one_h1_at_the_top, swap(4, "## Idea", "Idea\n===="), "cell 4 .* another H1"),
    (test_one_h1_at_the_top, swap(0, "# Title", "Title"), "cell 0"),
    (test_badge_opens_this_notebook, swap(0, "00_good", "01_next"), "opening: no line is"),
    (test_badge_opens_this_notebook, swap(4, "Idea", f"Idea ![]({setup_cell.BADGE})"), "cell 4 .* another badge"),
    (test_opening_links_back_and_on, swap(0, "(01_next", "(00_good"), "no link to 01_next"),
    (test_opening_says_what_is_learnt_needed_and_how_long, swap(0, "- do thing 2", ""), "2 points"),
    (test_opening_says_what_is_learnt_needed_and_how_long, swap(0, "You need", "Get"), "You need"),
    (test_opening_says_what_is_learnt_needed_and_how_long, swap(0, "Download: none.", ""), "download"),
    (test_opening_says_what_is_learnt_needed_and_how_long, swap(0, "about 30", "about TT"), "TT stands for"),
    (test_opening_says_what_is_learnt_needed_and_how_long, swap(0, "30 seconds", "long"), "no time"),
    (test_setup_cell_is_the_generated_one, swap(1, "Setup.", "Setup!"), "cell 1 .* not the setup cell"),
    (test_setup_cell_is_the_generated_one, put(1, tags=[]), "tagged 'setup'"),
    (test_parameters_follow_the_setup, put(3, tags=[]), "tagged 'parameters'"),
    (test_parameters_follow_the_setup, put(3, source="print(1)"), "cell 3 .* plain assignments"),
    (test_code_is_valid_python, put(5, source="%matplotlib inline"), "cell 5"),
    (test_code_is_valid_python, put(5, source='"\\d"'), "cell 5 .*invalid escape"),
    (test_only_the_setup_installs, put(5, source='run("pip", "install", "torch")'), "cell 5 .* installs"),
    (test_no_version_is_pinned, put(4, source="Take numpy=" + "=2.1."), "cell 4 .* pins"),
    (test_no_version_is_pinned, put(5, source='x = "numpy=' + '=2.1"'), "cell 5 .* pins"),
    (test_helpers_are_imported_by_name, put(5, source="from helpers.chunking import *"), "cell 5 .* import \\*"),
    (test_helpers_are_imported_by_name, put(5, source="import helpers.chunking"), "cell 5 .* by name"),
    (test_helpers_are_imported_by_name, put(5, source="import sys\nsys.path.append('..')"), "cell 5 .* line 2"),
    (test_code_cells_are_short, put(5, source="x = 1\n" * 30 + "x"), "cell 5 .* 31 lines"),
    (test_code_cells_are_short, put(5, source="x = 1\n" * 20 + "x"), "one code cell in ten.* cell 5"),
    (test_code_cells_are_short, put(5, source="x = " + "1" * 76), "cell 5 .* 80 columns"),
    (test_code_cells_are_short, put(5, source=""), "cell 5 .* empty"),
    (test_words_go_before_code, four_in_a_row, "cell 7 .* three code cells in a row"),
    (test_words_go_before_code, little_markdown, "under 0.8"),
    (test_words_go_before_code, little_markdown, "right after markdown"),
    (test_counts_run_from_one, put(5, execution_count=7), "cell 5 .* count 7, not 3"),
    (test_counts_run_from_one, put(5, execution_count=None), "cell 5 .* count None"),
    (test_outputs_have_no_stderr_and_no_error, prints("Warning", name="stderr"), "cell 5 .* stderr"),
    (test_format_and_metadata, lambda node: node.metadata.update(widgets={}), "state of widgets"),
    (test_format_and_metadata, lambda node: node.metadata.update(papermill={}), "metadata papermill"),
    (test_format_and_metadata, lambda node: node.update(nbformat_minor=4), "nbformat 4.4"),
    (test_format_and_metadata, put(5, id="c03"), "cell 5 .* id of another"),
    (test_size, prints("x" * MOST_BYTES), "bytes, more than"),
    (test_exemptions_are_few_and_followed_by_asserts, put(8, source="SIZE"), "cell 7 .* asserts nothing"),
    (test_exemptions_are_few_and_followed_by_asserts, put(8, source="def f():\n    assert 1"), "asserts nothing"),
    (test_exemptions_are_few_and_followed_by_asserts, put(5, tags=["nbval-skip"]), "one code cell in four"),
    (test_tags_are_known_and_nothing_is_exempt_by_comment, put(5, tags=["nbval-ignore-outputs"]), "cell 5 .* unknown"),
    (test_tags_are_known_and_nothing_is_exempt_by_comment, put(5, source="# NBVAL" + "_SKIP"), "cell 5 .* comment"),
    (test_times_go_through_the_formatter, put(5, source="print(perf_counter())"), "cell 5 .*format_seconds"),
    (test_listed_with_what_it_needs, put(5, tags=["nbval-skip"]), "cell 5 .* is skipped, but not"),
    (test_nothing_of_one_machine, prints("read " + "/ho" + "me/ada/x.pdf"), "cell 5 .* output: the path"),
    (test_nothing_of_one_machine, prints("C:" + "\\Users\\ada"), "cell 5 .* output: the path"),
    (test_nothing_of_one_machine, prints("<Embedder at 0x7f66a1b2c3d4>"), "cell 5 .* the address"),
    (test_nothing_of_one_machine, put(5, source='open("/t' + 'mp/x")'), "cell 5 .* source: the path"),
]


def of(rule: Callable) -> str:
    return rule.__name__.removeprefix("test_") if callable(rule) else "-"


@pytest.mark.parametrize(
    ("rule", "breaking", "says"), BREAKAGES, ids=lambda value: of(value) if callable(value) else ""
)
def test_a_broken_notebook_is_noticed(family, rule, breaking, says):
    rule(Notebook(family))
    node = nbformat.read(family, as_version=4)
    breaking(node)
    family.write_text(json.dumps(node), encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match=says) as caught:
        rule(Notebook(family))
    assert "00_good.ipynb" in str(caught.value) or says == "one code cell in ten.* cell 5"


def test_a_good_solution_passes_and_an_incomplete_one_is_noticed(family):
    path = family.parent / "solutions" / "00_solutions.ipynb"
    for rule in (test_opening_links_back_and_on, test_solutions_solve_every_exercise, test_one_h1_at_the_top):
        rule(Notebook(path))
    node = nbformat.read(path, as_version=4)
    node.cells = node.cells[:4]
    node.cells[0].source = "# Solutions"
    nbformat.write(node, path)
    for rule, says in (
        (test_opening_links_back_and_on, "no link to 00_good"),
        (test_solutions_solve_every_exercise, "1 headings for 3"),
        (test_badge_opens_this_notebook, "no line is"),
    ):
        with pytest.raises(pytest.fail.Exception, match=says):
            rule(Notebook(path))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("03_gap.ipynb", "not contiguous"),
        ("A2_gap.ipynb", "not contiguous"),
        ("02-Dashes.ipynb", "is named NN_topic"),
        ("solutions/05_solutions.ipynb", "no notebook of this number"),
        ("solutions/00_answers.ipynb", "named NN_solutions"),
    ],
)
def test_a_wrong_name_is_noticed(family, name, says):
    assert list(faults_of_names(family.parent)) == []
    (family.parent / name).write_text("{}")
    assert re.search(says, "\n".join(faults_of_names(family.parent)))


def test_a_stale_entry_is_noticed(family):
    with (setup_cell.ROOT / "tests" / "notebooks.toml").open("a") as file:
        file.write('["09_gone"]\nmachine = "a laptop"\n')
    assert "09_gone" in "\n".join(faults_of_names(family.parent))
