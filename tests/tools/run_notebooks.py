"""Run every notebook headless into runs/notebooks/: a progress line each, and the time it took.

python tests/tools/run_notebooks.py [NAME …]     # all, or those whose file name starts with NAME
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from helpers.settings import ROOT, RUNS, format_seconds

CELL_SECONDS = 600


def run(path: Path, out: Path) -> None:
    """Execute one notebook in its own folder, as JupyterLab does, and write it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": path.parent}})
    try:
        client.execute()
    finally:
        out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, out)


def main(names: list[str]) -> int:
    folder = ROOT / "notebooks"
    paths = sorted(folder.glob("*.ipynb")) + sorted((folder / "solutions").glob("*.ipynb"))
    chosen = [path for path in paths if not names or path.name.startswith(tuple(names))]
    failed = 0
    for number, path in enumerate(chosen, start=1):
        name = path.relative_to(folder).as_posix()
        print(f"[{number}/{len(chosen)}] {name} … ", end="", flush=True)
        started = time.perf_counter()
        try:
            run(path, RUNS / "notebooks" / name)
            print(format_seconds(time.perf_counter() - started))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed += 1
            print(f"failed after {format_seconds(time.perf_counter() - started)}\n{error}")
    print(f"{len(chosen) - failed} of {len(chosen)} notebooks ran; they are in {RUNS.relative_to(ROOT)}/notebooks/.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
