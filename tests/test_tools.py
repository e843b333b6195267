"""The tools that make the recorded runs of notebook 05, on toys: that they run, and write what the notebook reads."""

import importlib
import json
import sys

import pytest

from helpers import settings

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
