"""Neutral conversations that the model leads itself, where nobody has any to calibrate with: questions drawn anew, no prompt."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from persona_lens.errors import MonitoringError
from persona_lens.models import ChatModel, Message, Sampling
from persona_lens.progress import Progress, progress_bars
from persona_lens.sampling import Script, converse
from persona_lens.store import RunFolder, read_jsonl

CHUNK_SCRIPTS = 64
SAMPLING = Sampling(max_new_tokens=300)


def scripts_of(questions: Sequence[str], n: int, turns: int, *, seed: int = 0) -> list[Script]:
    """`n` scripts of different questions in random orders.

    Raises:
        MonitoringError: fewer questions than turns.
    """
    if len(questions) < turns:
        raise MonitoringError(f"a conversation of {turns} turns needs as many questions, there are {len(questions)}: add questions")
    rng = np.random.default_rng(seed)
    drawn: list[list[int]] = [rng.permutation(len(questions))[:turns].tolist() for _ in range(n)]
    return [Script(f"neutral/{seed}/{i}", tuple(questions[q] for q in order)) for i, order in enumerate(drawn)]


def neutral_conversations(
    model: ChatModel,
    scripts: Sequence[Script],
    out: str | Path,
    *,
    sampling: Sampling = SAMPLING,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Sequence[Message]]:
    """Let the model answer scripts, and keep the conversations in a run folder (`conversations.jsonl`, for `read_transcripts`).

    An interrupted run goes on where it stopped.

    Returns:
        Messages by name. Conversations that ended early (a full context, an empty answer) are among them, with the turns they have.

    Raises:
        PersonaLensError: a model that thinks, a script without messages, or whose first answer does not fit into the context.
        RunFolderError: the folder holds another run.
    """
    model.require_no_thinking("a calibration that the model leads itself")
    arguments = {"scripts": [[s.id, s.system, list(s.users)] for s in scripts], "sampling": asdict(sampling), "seed": seed}
    folder = RunFolder.open(Path(out), command="converse", arguments=arguments, model=model.identity)

    def held(chunk: range) -> list[dict[str, object]]:
        return [c.as_dict() for c in converse(model, scripts[chunk.start : chunk.stop], sampling, seed=seed)]

    with progress_bars(None if progress is None else False) as bars:
        told = progress or bars
        folder.fill(
            "conversations.jsonl",
            len(scripts),
            held,
            chunk=CHUNK_SCRIPTS,
            told=lambda n: told("conversations", n, len(scripts)),
        )
    return {r["id"]: r["messages"] for r in read_jsonl(folder.path / "conversations.jsonl")}
