"""`python -m helpers train` and `export`, as a person at a terminal uses them."""

import json
import os
import signal
import subprocess
import sys

import pytest
import stand_in_model

from helpers import __main__, finetuning, ollama, settings

THINGS = "lamp rope tide oar net buoy mast keel anchor sail gull crab pier bell fog lens stair boat".split()
ROWS = [{"instruction": f"What is {it}?", "output": f"From the quay: {it} is blue. Late, but lit."} for it in THINGS]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return stand_in_model.make(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return stand_in_model.write_rows(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "RUNS", tmp_path / "runs")


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(finetuning, "read_base", lambda *_: pytest.fail("the base was loaded"))


def run(*arguments):
    return __main__.main([str(argument) for argument in arguments])


def test_train_and_export(base, dataset, tmp_path, capsys):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    settings_of_it = ("--epochs", 2, "--learning-rate", 0.01, "--rank", 4, "--batch", 2, "--seed", 3)
    assert run("train", "--base", base, "--dataset", dataset, "--out", adapter, *settings_of_it) == 0
    out = capsys.readouterr().out
    assert "16 steps of 2 rows" in out and "Step 0 of 16: held out " in out and "Trained in" in out
    last = out.partition("Step 16 of 16: loss ")[2].split("\n")[0]
    assert float(last.split(", held out ")[1]) < float(out.partition("held out ")[2].split("\n")[0]) - 1
    recipe = json.loads((adapter / "run.json").read_text("utf-8"))["recipe"]
    assert [recipe[name] for name in ("epochs", "learning_rate", "rank", "batch", "seed")] == [2, 0.01, 4, 2, 3]
    assert recipe["alpha"] == 32 and recipe["max_length"] == 1024  # what isn't named is the course's
    assert run("export", "--adapter", adapter, "--out", merged, "--gguf", "--dtype", "float32") == 0
    out = capsys.readouterr().out
    assert f"{merged}: the adapter moves its logits by" in out and f"{merged}.gguf: " in out
    assert (merged / "model.safetensors").exists() and (tmp_path / "merged.gguf").exists()
    assert "FROM" in (tmp_path / "merged.Modelfile").read_text("utf-8")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_the_plan_alone_trains_nothing(base, dataset, tmp_path, capsys):
    assert run("train", "--base", base, "--dataset", dataset, "--out", tmp_path / "out", "--plan") == 0
    out = capsys.readouterr().out
    assert "GiB" in out and "time: about" in out and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_plan_that_does_not_fit_has_exit_code_2(base, dataset, monkeypatch, capsys):
    monkeypatch.setattr("helpers.planning._free_memory", lambda device: 0.001)
    assert run("train", "--base", base, "--dataset", dataset, "--plan") == 2
    out, err = capsys.readouterr()
    assert "Refused: " in out and "GiB of memory even row by row" in err


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--dataset", "no-such.jsonl"], "There is no training set no-such.jsonl"),
        (["train", "--base", "no such folder"], "The base model 'no such folder' can't be loaded"),
        (["train", "--base", "tiny", "--rank", "0"], "rank is 0: set it to more than 0"),
        (["train", "--base", "tiny", "--max-length", "20"], "tokens, and 20 fit"),
        (["train", "--out", "tests"], "tests holds something else than an adapter"),
        (["export", "--adapter", "no-such-folder"], "no-such-folder holds no adapter"),
    ],
)
def test_bad_input_has_exit_code_2_and_says_what_to_do(monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(settings.ROOT)
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert said in err and err.startswith("helpers: ") and "Traceback" not in err and out == ""


def test_export_to_ollama_looks_for_it_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ollama, "find_binary", lambda: None)
    monkeypatch.setattr(ollama.Ollama, "version", lambda self: None)
    monkeypatch.setattr("helpers.export.merge", lambda *_: pytest.fail("hours of work"))
    assert run("export", "--adapter", tmp_path, "--ollama", "quay") == 2
    assert "Ollama" in capsys.readouterr().err


def test_on_a_terminal_the_losses_stand_beside_a_bar(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(__main__, "_progress", lambda *_: lambda *given: seen.append(given))
    watch = __main__._losses()
    watch([{"step": 0, "eval_loss": 3.0}], 0, 8)
    watch([{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.5}], 1, 8)
    assert seen == [(0, 8, "held out 3.000"), (1, 8, "loss 2.500, held out 3.000")]
    assert capsys.readouterr().out == ""


def test_ctrl_c_says_that_the_same_command_goes_on_and_it_does(base, dataset, tmp_path):
    """As a process: the signal comes while the trainer is at work."""
    start = "import sys; from pathlib import Path; from helpers import __main__, settings; "
    start += f"settings.RUNS = Path({str(tmp_path)!r}); sys.exit(__main__.main(sys.argv[1:]))"
    given = ["--base", base, "--dataset", str(dataset), "--out", str(tmp_path / "out"), "--epochs", "5"]
    command, pipes = [sys.executable, "-c", start, "train", *given], {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, stderr=subprocess.PIPE, **pipes) as process:
        while not (line := process.stdout.readline()).startswith("Step 12 of"):
            assert line, process.stderr.read()
        os.kill(process.pid, signal.SIGINT)
        process.stdout.read()
        assert "Stopped. The same command goes on from the last checkpoint." in process.stderr.read()
    assert process.returncode == 130 and not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Going on from step " in done.stdout, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_name_with_a_dot_is_kept_whole(tmp_path, monkeypatch, capsys):
    """Of house-v1.1 and house-v1.2 neither takes the other's file."""
    monkeypatch.setattr("helpers.export.merge", lambda *_: {"effect": 1.0, "error": 0.0})
    monkeypatch.setattr("helpers.export.to_gguf", lambda folder, out, dtype: (out.write_bytes(b"x"), out)[1])
    monkeypatch.setattr("helpers.export.modelfile", lambda path: f"FROM {path}")
    for version in ("1", "2"):
        assert run("export", "--adapter", tmp_path, "--out", tmp_path / f"house-v1.{version}", "--gguf") == 0
    written = [f"house-v1.{version}.{end}" for version in ("1", "2") for end in ("Modelfile", "gguf")]
    assert sorted(path.name for path in tmp_path.iterdir()) == written
