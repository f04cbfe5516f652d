"""Own answers from a sampler, such as a server with the same weights, instead of from the model that scores.

They are greedy and asked for before a shard is scored, one per distinct prompt, and kept beside the scores: the model then reads
them in a forced pass. No answer may be missing: one that the model made itself in its place would mix two engines.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from persona_lens.activations import Span
from persona_lens.errors import ScreeningError
from persona_lens.models import ChatModel, Message, Sampling
from persona_lens.prompts import Prompt
from persona_lens.sampling import Sampler, sampled
from persona_lens.screening.own import Tokens, prompt_hash
from persona_lens.screening.scoring import ScreenSettings, answers_itself, asked_in, sample_of
from persona_lens.store import write_atomically
from persona_lens.transcripts import Skipped, Transcript


def served_answers(
    model: ChatModel, rows: Sequence[Transcript | Skipped], settings: ScreenSettings, sampler: Sampler
) -> dict[int, Tokens]:
    """The sampler's greedy answers to the prompts of a shard that get one, by the prompt's hash.

    Raises:
        ScreeningError: an answer whose tokens cannot be told.
    """
    wanted: dict[int, Prompt] = {}
    for row, span in _answered(model, rows, settings):
        if (key := prompt_hash(span.prompt)) not in wanted:
            prompt = _prompt(asked_in(row), row.place)
            if tuple(model.render(prompt.messages)) != span.prompt:
                raise ScreeningError(f"place {row.place}: its prompt is rendered otherwise for a sampler: leave sampler out")
            wanted[key] = prompt
    asked = [(prompt, 0) for prompt in wanted.values()]
    found = sampled(sampler, asked, Sampling(settings.max_new_tokens, temperature=0.0), settings.seed) if asked else []
    if gaps := [r for r in found if r.gap]:
        raise ScreeningError(
            f"{sampler.name}: no own answer to {gaps[0].prompt_id} ({gaps[0].gap}) and {len(gaps) - 1} others: "
            "use a server that returns token ids, or leave sampler out"
        )
    return {key: r.token_ids for key, r in zip(wanted, found, strict=True)}


def write_answers(path: Path, answers: Mapping[int, Tokens]) -> None:
    """Keep answers as the columns that a shard's file has for them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"prompt": pa.array(answers, pa.int64()), "own_tokens": pa.array(map(list, answers.values()), pa.list_(pa.int32()))}
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(file.getvalue()))


def _answered(
    model: ChatModel, rows: Sequence[Transcript | Skipped], settings: ScreenSettings
) -> Iterator[tuple[Transcript, Span]]:
    for row in rows:
        span = sample_of(model, row, settings)
        if isinstance(row, Transcript) and isinstance(span, Span) and answers_itself(model, span, settings):
            yield row, span


def _prompt(messages: Sequence[Message], place: int) -> Prompt:
    """A conversation up to the answer as a prompt."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    said = [m["content"] for m in messages[system is not None :]]  # of user and assistant in turn, as transcripts are
    earlier = tuple(zip(said[:-1:2], said[1::2], strict=True))
    return Prompt(f"place {place}", "-", "neutral", None, place, system, said[-1], earlier)
