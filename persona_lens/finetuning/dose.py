"""How much of which vector to vaccinate with: strengths that match what the data would teach.

The vaccine works where the vectors supply what training would otherwise have to put into the weights. So the strengths at dose 1
are those whose sum comes nearest to the mean difference between the data's answers and the model's own answers to the same prompts
(the projection difference of Chen et al. 2025, section 6, for several vectors at once).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.activations import POOLINGS, Span, dialogue_span, pool
from persona_lens.errors import FinetuningError
from persona_lens.finetuning.data import Data, read_data
from persona_lens.models import ChatModel, Sampling, dialogue
from persona_lens.prompts import Prompt
from persona_lens.sampling import sample
from persona_lens.transcripts import Transcript
from persona_lens.vectors import PersonaVectors

RESPONSE: Final = POOLINGS.index("response_mean")
ROWS: Final = 128


@dataclass(frozen=True, eq=False)
class Matched:
    """Strengths of several vectors that together match the data.

    Attributes:
        strengths: by vector, in the order they were given.
        share: of the squared length of the difference that their sum explains (0-1).
        difference: mean residual of the data's answers minus that of the model's own.
    """

    strengths: tuple[float, ...]
    share: float
    difference: Float[Tensor, "layer d_model"]


def matched_strengths(
    model: ChatModel,
    data: Data,
    vectors: Sequence[PersonaVectors],
    layer: int,
    *,
    rows: int = ROWS,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Matched:
    """Strengths whose vectors add up to what the data's answers have beyond the model's own (least squares at the layer).

    Args:
        rows: conversations that are read, evenly spread over the data.

    Raises:
        FinetuningError: no vectors, or no such layer.
    """
    if not vectors or not 0 <= layer < model.n_layers:
        raise FinetuningError(
            f"strengths are matched for one or more vectors at a layer from 0 to {model.n_layers - 1}, not {layer}"
        )
    difference = data_difference(model, data, rows=rows, sampling=sampling, seed=seed)
    basis = torch.stack([v[layer] for v in vectors], -1).double().numpy()
    target = difference[layer].double().numpy()
    strengths = np.linalg.lstsq(basis, target, rcond=None)[0]
    left = target - basis @ strengths
    return Matched(tuple(map(float, strengths)), float(1 - (left @ left) / (target @ target)), difference)


def data_difference(
    model: ChatModel, data: Data, *, rows: int = ROWS, sampling: Sampling | None = None, seed: int = 0
) -> Float[Tensor, "layer d_model"]:
    """Mean residual of the data's last answers minus that of the model's own answers to the same prompts (response means)."""
    chats = read_data(data).chats
    chosen = [chats[i] for i in np.unique(np.linspace(0, len(chats) - 1, min(rows, len(chats))).round().astype(int))]
    prompts = [_prompt(chat) for chat in chosen]
    own = sample(model, [(p, 0) for p in prompts], sampling or Sampling(max_new_tokens=300), seed=seed)
    theirs = [dialogue_span(chat.name, dialogue(model, _upto_answer(chat))) for chat in chosen]
    ours = [Span(r.key, tuple(model.render(p.messages)), r.token_ids) for p, r in zip(prompts, own, strict=True) if r.token_ids]
    return _mean(model, theirs) - _mean(model, ours)


def _upto_answer(chat: Transcript) -> list[dict[str, str]]:
    last = max(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
    return list(chat.messages[: last + 1])


def _prompt(chat: Transcript) -> Prompt:
    """The conversation up to its last answer."""
    said = _upto_answer(chat)[:-1]
    system = said.pop(0)["content"] if said[0]["role"] == "system" else None
    *earlier, user = (m["content"] for m in said)
    return Prompt(
        f"data/{chat.name}", "data", "neutral", None, 0, system, user, tuple(zip(earlier[::2], earlier[1::2], strict=True))
    )


def _mean(model: ChatModel, spans: Sequence[Span]) -> Float[Tensor, "layer d_model"]:
    total = torch.zeros(model.n_layers, model.d_model, dtype=torch.float64)
    for pooled in pool(model, spans):
        total += pooled.values[:, RESPONSE].double().sum(0)
    return (total / len(spans)).float()
