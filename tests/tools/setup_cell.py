"""Write the one setup cell into every notebook, and the badge that opens each on Colab.

    python tests/tools/setup_cell.py            # write
    python tests/tools/setup_cell.py --check    # exit 1 and name the notebooks that differ

The address of the repository stands in pyproject.toml alone.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"

SETUP = f'''\
# Setup. It acts on Colab only; elsewhere `make lab` has done it all.
import os, site, subprocess, sys, sysconfig
from importlib.metadata import version
from pathlib import Path

HOME = Path("/content/course")
if "google.colab" in sys.modules and not HOME.exists():
    address = "{REPOSITORY}"
    subprocess.run(["git", "clone", "--depth=1", address, HOME], check=True)
    # What the kernel has loaded must not move under it.
    fixed = [f"{{p}}=={{version(p)}}" for p in ("numpy", "torch", "pyarrow")]
    Path("/content/fixed.txt").write_text("\\n".join(fixed))
    pip = [sys.executable, "-m", "pip"]
    install = [*pip, "install", "-q", "-c", "/content/fixed.txt", "-e", HOME]
    # PEFT refuses a version of it that Colab has had; nothing here uses it.
    subprocess.run([*pip, "uninstall", "-qy", "torchao"], check=True)
    subprocess.run(install, check=True)
    # So that this kernel sees `helpers`.
    site.addsitedir(sysconfig.get_paths()["purelib"])
    os.chdir(HOME / "notebooks")'''


def notebooks() -> list[Path]:
    """Return every notebook of the course, the solutions among them."""
    return sorted((ROOT / "notebooks").glob("*.ipynb")) + sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))


def badge(path: Path) -> str:
    """Return the Markdown of the badge that opens this notebook on Colab."""
    place = REPOSITORY.removeprefix("https://github.com/")
    name = path.relative_to(ROOT).as_posix()
    return f"[![Open in Colab]({BADGE})](https://colab.research.google.com/github/{place}/blob/main/{name})"


def written(path: Path) -> nbformat.NotebookNode:
    """Return the notebook with its setup cell (tagged `setup`) and badge as they should be."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "setup" in cell.metadata.get("tags", []):
            cell.source = SETUP
        elif cell.cell_type == "markdown":
            cell.source = re.sub(rf"\[!\[Open in Colab\]\({re.escape(BADGE)}\)\]\([^)]*\)", badge(path), cell.source)
    return notebook


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a notebook differs")
    check = parser.parse_args().check
    different = [path for path in notebooks() if written(path) != nbformat.read(path, as_version=4)]
    for path in different:
        print(f"{'differs' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            nbformat.write(written(path), path)
    return 1 if check and different else 0


if __name__ == "__main__":
    sys.exit(main())
