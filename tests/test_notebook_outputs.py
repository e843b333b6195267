"""`make test` compares the outputs of notebooks with those of a fresh run. Does that notice what it should?"""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers.settings import ROOT, format_seconds


def compare(notebook: Path, *options: str) -> subprocess.CompletedProcess:
    """Run a notebook under nbval with the project's options; the exit status is 0 if all outputs are the same."""
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", f"--rootdir={notebook.parent}"]
    command += ["-p", "no:cacheprovider", "--color=no", *options, notebook]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


CELLS = [
    # source, what it prints or shows, an altered form of it, and whether that is to be noticed
    ("print('three passages')", "three passages\n", "four passages\n", True),
    ("0.125", "0.125", "0.126", True),
    (
        "from IPython.display import HTML\nHTML('<b>3</b>')",
        {"text/html": "<b>3</b>", "text/plain": "<IPython.core.display.HTML object>"},
        {"text/html": "<b>4</b>", "text/plain": "<IPython.core.display.HTML object>"},
        True,
    ),
    ("print('took 0.42 s')", "took 0.42 s\n", "took 71.05 s\n", False),
    ("print('took 0.42 s')", "took 0.42 s\n", "needed 0.42 s\n", True),
    ("print('took 0.421 s')", "took 0.421 s\n", "took 0.422 s\n", True),
    ("print('said')", "said\n", None, True),
    ("print('any')  # exempt", "any\n", "other\n", False),
]


def notebook_of(folder: Path, altered: bool) -> Path:
    notebook = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for count, (source, given, other, _) in enumerate(CELLS, start=1):
        shown = other if altered else given
        if shown is None:
            outputs = []
        elif "print" in source:
            outputs = [new_output("stream", text=shown)]
        else:
            data = shown if isinstance(shown, dict) else {"text/plain": shown}
            outputs = [new_output("execute_result", data=data, execution_count=count)]
        tags = ["nbval-ignore-output"] if "exempt" in source else []
        notebook.cells.append(
            new_code_cell(source, execution_count=count, outputs=outputs, metadata={"tags": tags}, id=f"c{count}")
        )
    path = folder / "cells.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.mark.parametrize("altered", [False, True], ids=["as it ran", "altered"])
def test_an_altered_output_is_noticed(tmp_path, altered):
    report = tmp_path / "report.xml"
    done = compare(notebook_of(tmp_path, altered), f"--junit-xml={report}")
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert len(cases) == len(CELLS), done.stdout
    noticed = [case.find("failure") is not None for case in cases]
    assert noticed == [altered and notice for *_, notice in CELLS], done.stdout
    assert done.returncode == int(altered)


def test_a_cell_that_fails_is_noticed(tmp_path):
    path = notebook_of(tmp_path, altered=False)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [new_code_cell("assert 1 == 2", execution_count=1, metadata={"tags": ["nbval-ignore-output"]})]
    nbformat.write(notebook, path)
    assert compare(path).returncode == 1


@pytest.mark.parametrize("seconds", [0.0, 0.00042, 0.00999999, 0.01, 0.42, 9.5, 99.999, 100.0, 200.4, 3671.0])
def test_every_time_is_masked(seconds):
    from nbval.plugin import get_sanitize_patterns

    text = f"index  {format_seconds(seconds):>12} and {format_seconds(seconds)}, 0.42 of 3"
    for pattern, mask in get_sanitize_patterns((ROOT / "tests" / "nbval_sanitize.cfg").read_text()):
        text = re.sub(pattern, mask, text)
    assert text == "index<time>and<time>, 0.42 of 3"
