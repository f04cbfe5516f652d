"""Shared fixtures: the pocket model, tiny random models of real architectures, and a small finished extraction."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker, also in the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from filelock import FileLock
from threadpoolctl import threadpool_limits
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from persona_lens.extraction import ExtractionRun, ExtractionSettings, extract, load_run
from persona_lens.models import ChatModel, Sampling, load_model
from persona_lens.pocket import weights_folder

if "PYTEST_XDIST_WORKER" in os.environ:  # libraries that were loaded before the variable was set
    ONE_THREAD = threadpool_limits(1)
SMALL = ExtractionSettings(samples=1, neutral=20, sampling=Sampling(max_new_tokens=120), batch_rows=64)


@pytest.fixture(scope="session")
def pocket() -> ChatModel:
    return load_model("pocket")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(weights_folder())


@pytest.fixture
def plain_pocket() -> PreTrainedModel:
    """The pocket model in plain transformers, fp32, without any bridge."""
    return AutoModelForCausalLM.from_pretrained(weights_folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def small_run(pocket: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> ExtractionRun:
    """An extraction of one trait at one sample per prompt; the first worker makes it, the others copy it."""
    made = tmp_path_factory.getbasetemp().parent / "small_run" if "PYTEST_XDIST_WORKER" in os.environ else None
    own = tmp_path_factory.mktemp("runs") / "optimism"
    if made is None:
        return extract(pocket, "optimism", out=own, settings=SMALL)
    with FileLock(f"{made}.lock"):
        extract(pocket, "optimism", out=made, settings=SMALL)
    shutil.copytree(made, own)
    return load_run(own)


@pytest.fixture
def small_settings() -> ExtractionSettings:
    return SMALL


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "run"
