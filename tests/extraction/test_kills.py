"""Killing an extraction at random moments (SIGKILL) and resuming it ends with the bytes of an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FILES = (
    "run.json",
    "rollouts.jsonl",
    "scores.jsonl",
    "means.safetensors",
    "neutral.safetensors",
    "vectors.safetensors",
    "summary.json",
    "trait.json",
)
KILLS = 20
OPTIONS = ["--samples", "10", "--neutral", "256", "--max-new-tokens", "120"]


def start(out: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-c",
        "from persona_lens.cli import main; main()",
        "extract",
        "optimism",
        *OPTIONS,
        "--out",
        str(out),
    ]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    duration = time.monotonic() - began
    rng = random.Random(0)
    kills = 0
    while kills < KILLS:
        process = start(tmp_path / "killed")
        time.sleep(5 + rng.random() * duration * 2 / KILLS)
        if process.poll() is not None:
            assert process.returncode == 0
            (tmp_path / "killed" / "optimism" / "vectors.safetensors").unlink()
            (tmp_path / "killed" / "optimism" / "scores.jsonl").unlink()
            continue
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert start(tmp_path / "killed").wait() == 0
    for name in FILES:
        assert (tmp_path / "killed" / "optimism" / name).read_bytes() == (tmp_path / "whole" / "optimism" / name).read_bytes(), name
