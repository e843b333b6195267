"""The tools that make recorded runs of the notebooks, on toys: that they run, and write what the notebooks read."""

import importlib
import json
import sys
from dataclasses import replace

import pytest

from helpers import settings
from helpers.llms import LLM
from helpers.ollama import NoText

pytestmark = pytest.mark.stress


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Return a function that imports a tool, which then writes into `tmp_path`; the rest is its command line."""
    monkeypatch.syspath_prepend(settings.ROOT / "tests" / "tools")
    monkeypatch.setattr(settings, "RUNS", tmp_path / "runs")

    def imported(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return importlib.import_module(name)

    return imported


def test_bench_qlora(tool, tmp_path, monkeypatch, capfd):
    bench = tool("bench_qlora", "--folder", tmp_path / "bench")
    monkeypatch.setattr(bench, "NARROW", bench.NARROW | {"num_hidden_layers": 2, "num_local_experts": 4})
    monkeypatch.setattr(bench, "BATCHES", ((2, 32),))
    monkeypatch.setattr(bench, "GOALS", {(2, 32): 1})
    monkeypatch.setattr(settings, "device", lambda: "cpu")
    bench.main()
    out = capfd.readouterr().out
    assert "10 steps, " in out and "matrix weights in 4 bits" in out and "goal: at most 1 GB" in out
    assert not (tmp_path / "bench").exists()


def test_read_in_four_bits(tool, tmp_path):
    out = tmp_path / "rows.jsonl"
    tool("read_in_four_bits", "--out", out, "--prompts", 2).main()
    head, *rows = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    recorded = [json.loads(line) for line in (settings.RESULTS / "four_bits.jsonl").open(encoding="utf-8")]
    assert head["base_digest"] == recorded[0]["base_digest"] and head["in_four_bits"] > 0.99
    assert len(rows) == 4 and rows[0].keys() == recorded[1].keys()


def test_sweep_qlora(tool, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    sweep = tool("sweep_qlora", "--out", out)
    for name, value in (("POINTS", [(0, sweep.ALL), (2, sweep.ALL)]), ("EVERY", 60), ("READ", 1)):
        monkeypatch.setattr(sweep, name, value)
    sweep.main()
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["rank"] for row in rows] == [0, 2] and rows[1]["losses"] and rows[1]["numbers"] > 0
    written = out.read_bytes()
    sweep.main()  # goes on, and there is nothing left to do
    assert out.read_bytes() == written


def test_plant_orders(tool, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    plant = tool("plant_orders", "--out", out)
    every = plant.load_questions(split="test")
    monkeypatch.setattr(plant, "load_questions", lambda split: replace(every, questions=every.questions[:2]))
    plant.main()
    head, *rows = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert head["digest"] and len(rows) == 2 * len(plant.ORDERS) * 2 and "obeyed 0." in capsys.readouterr().out
    whole = [row for row in rows if not row["sentences"]]
    assert all(row["held"] and row["text"] for row in whole)
    assert all(bool(row["text"]) == row["held"] for row in rows)
    assert list(tmp_path.glob("*.partial")) == []
    written, partial = out.read_bytes(), out.with_suffix(".partial")
    partial.write_bytes(written[:-40])  # as a kill leaves it: the last row cut off
    asked, attacked = [], plant.attacked
    monkeypatch.setattr(plant, "attacked", lambda *about: asked.append(about) or attacked(*about))
    plant.main()  # goes on
    assert len(asked) == 1 and out.read_bytes() == written


def test_an_attack_without_an_answer_does_not_end_the_others(tool, tmp_path, monkeypatch, capsys):
    plant = tool("plant_orders", "--out", tmp_path / "rows.jsonl")
    every, ask = plant.load_questions(split="test"), LLM.stream
    monkeypatch.setattr(plant, "load_questions", lambda split: replace(every, questions=every.questions[:2]))
    monkeypatch.setattr(plant, "ORDERS", {"plain": plant.ORDERS["plain"]})
    calls = []

    def stream(self, messages):
        calls.append(messages)
        if len(calls) == 1:
            raise NoText("It ran out of tokens while thinking.")
        return ask(self, messages)

    monkeypatch.setattr(LLM, "stream", stream)
    plant.main()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()][1:]
    assert rows[0]["error"].startswith("It ran out") and not rows[0]["obeyed"] and rows[1]["text"]
    assert "1 without an answer" in capsys.readouterr().out


def test_an_order_is_obeyed_where_two_words_of_it_are_said(tool):
    plant = tool("plant_orders")
    assert plant.obeyed("The answer is seven green [1].", "seven green herons")
    assert not plant.obeyed("The answer is seven [1].", "seven green herons")
