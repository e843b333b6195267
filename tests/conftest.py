"""What every test shares. The environment is set before anything imports torch or the hub's client."""

import multiprocessing
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HELPERS_DTYPE"] = "float32"  # the same numbers on every machine
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # two torch processes with more threads slow each other many times

import pytest

from helpers import settings


@pytest.fixture(scope="session")
def embedder():
    """The course's encoder on the CPU; loading it takes seconds, so all tests share one."""
    from helpers.embeddings import Embedder

    return Embedder()


@pytest.fixture(scope="session")
def forkserver():
    """Make processes of the start method "forkserver" begin with the libraries imported, which takes long once."""
    models = (f"transformers.{name}" for name in ("models.gpt_oss.modeling_gpt_oss", "integrations.mxfp4"))
    libraries = ["sentence_transformers", "trl.trainer.sft_trainer", "peft", "bitsandbytes", *models]
    multiprocessing.get_context("forkserver").set_forkserver_preload([*libraries, "test_finetuning"])


@pytest.fixture
def indexes(monkeypatch, tmp_path):
    """An empty folder where this test's indexes go, instead of runs/index."""
    monkeypatch.setattr(settings, "INDEXES", tmp_path / "index")
    return settings.INDEXES


@pytest.fixture(scope="session")
def session_indexes(tmp_path_factory):
    """The same for all the tests that ask for it, so that they can share one index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "INDEXES", tmp_path_factory.mktemp("indexes"))
        yield settings.INDEXES
