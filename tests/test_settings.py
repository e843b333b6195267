"""The course's constants, what this machine has, and how soon `helpers` can be imported."""

import json
import math
import subprocess
import sys

import pytest

from helpers import settings


def child(code, cwd):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=cwd, timeout=60, check=False, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_importing_helpers_takes_under_a_second(tmp_path):
    code = (
        "import json, sys, time\n"
        "started = time.perf_counter()\n"
        "import helpers\n"
        "print(json.dumps([time.perf_counter() - started, sorted(sys.modules)]))"
    )
    seconds, modules = child(code, tmp_path)
    assert seconds < 1
    assert not {"torch", "numpy", "transformers", "pypdf"} & set(modules)


def test_importing_every_module_of_helpers_loads_nothing_heavy(tmp_path):
    """Heavy imports happen inside the function that needs them."""
    code = (
        "import importlib, json, pkgutil, sys\n"
        "import helpers\n"
        "names = [m.name for m in pkgutil.iter_modules(helpers.__path__) if not m.ispkg and m.name != '__main__']\n"
        "for name in names:\n    importlib.import_module('helpers.' + name)\n"
        "print(json.dumps([names, sorted(sys.modules)]))"
    )
    names, modules = child(code, tmp_path)
    assert {"chunking", "embeddings", "language", "settings", "retrieval"} <= set(names)
    heavy = {"torch", "transformers", "sentence_transformers", "faiss", "pypdf", "bm25s", "scipy", "sklearn"}
    # langchain_core is let in: a chat model is a subclass of its own.
    assert not (heavy | {"langchain_community", "trl", "peft", "bitsandbytes", "datasets"}) & set(modules)


@pytest.mark.parametrize("asked", [None, "0"])
def test_nothing_is_reported_to_the_hub_unless_it_is_asked_for(tmp_path, monkeypatch, asked):
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    if asked:
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", asked)
    code = (
        "import json, helpers\nfrom huggingface_hub import constants\n"
        "print(json.dumps(constants.HF_HUB_DISABLE_TELEMETRY))"
    )
    assert child(code, tmp_path) is (asked is None)


def test_paths_do_not_depend_on_the_working_directory(tmp_path):
    code = "import json; from helpers import settings as s; print(json.dumps([str(s.DOCUMENTS), str(s.INDEXES)]))"
    assert child(code, tmp_path) == [str(settings.DOCUMENTS), str(settings.ROOT / "runs" / "index")]
    assert settings.DOCUMENTS.is_dir() and settings.QUESTIONS.is_file() and settings.LOCK.is_file()


def test_the_defaults_are_the_specification():
    assert (settings.CHUNK_SIZE, settings.CHUNK_OVERLAP, settings.TOP_K) == (1000, 200, 3)
    assert settings.EMBEDDING_MODEL == "sentence-transformers/all-MiniLM-L6-v2"
    assert settings.OLLAMA_MODEL == "gpt-oss:20b"


def test_hidden_gpus_stay_hidden():
    assert settings.device() == "cpu"


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_the_environment_chooses_the_dtype(monkeypatch, asked, device):
    monkeypatch.setenv("HELPERS_DTYPE", asked)
    assert settings.encoder_dtype(device) == asked


@pytest.mark.parametrize("asked", ["float99", "float16", "FLOAT32", " "])
def test_a_wrong_dtype_is_refused_with_its_name_and_the_choice(monkeypatch, asked):
    monkeypatch.setenv("HELPERS_DTYPE", asked)
    with pytest.raises(ValueError, match="set it to float32 or bfloat16") as error:
        settings.encoder_dtype("cpu")
    assert "HELPERS_DTYPE" in str(error.value) and repr(asked) in str(error.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx512_bf16"}, "bfloat16"),
        ({"amx_bf16", "avx2"}, "bfloat16"),
        ({"avx2", "avx512f"}, "float32"),
        (set(), "float32"),
    ],
)
def test_bfloat16_is_chosen_on_cpus_that_multiply_it(monkeypatch, flags, expected):
    monkeypatch.setenv("HELPERS_DTYPE", "")
    monkeypatch.setattr(settings, "cpu_flags", lambda: flags)
    assert settings.encoder_dtype("cpu") == expected
    assert settings.encoder_dtype("mps") == "float32"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/cpuinfo is Linux's")
def test_the_flags_of_this_cpu_are_words():
    assert all(flag.isprintable() and " " not in flag for flag in settings.cpu_flags())


def test_machine_looks_at_this_machine():
    found = settings.machine()
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert found.cores >= 1
    assert 0 < found.free_memory_gib <= found.memory_gib
    assert found.free_disk_gib > 0
    assert (found.gpu, found.gpu_memory_gib, found.gpu_dtypes) == (None, 0.0, ())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.00 ms"), (0.00042, "0.42 ms"), (0.01, "0.01 s"), (0.42, "0.42 s"), (59.999, "60.00 s"), (99.9, "99.90 s"),
     (100, "1 min 40 s"), (200.7, "3 min 20 s"), (7325, "122 min 5 s")],
)  # fmt: skip
def test_format_seconds(seconds, text):
    assert settings.format_seconds(seconds) == text


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("learning_rate", math.nan), ("learning_rate", math.inf)])
def test_a_setting_that_no_training_takes_is_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value}: set it to"):
        settings.Recipe(**{name: value})
