"""What a user's message alone makes a projection do, so that an alarm is about the persona and not about the topic.

Each message is read in a conversation of its own, where nobody has said anything yet: what is left there is its content. (Read in
place it also tells the persona, which colours how the model reads; to hold that would be to hold what the alarm is about.)
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from persona_lens.errors import MonitoringError
from persona_lens.models import ChatModel, message_spans
from persona_lens.monitoring.probes import Probe
from persona_lens.monitoring.reading import Part, Rendered, read_turns

Embedding = Callable[[Sequence[str]], Float[np.ndarray, "message feature"]]


def content_features(
    model: ChatModel, messages: Sequence[str], probes: Sequence[Probe], embed: Embedding | None = None
) -> dict[str, Float[np.ndarray, " feature"]]:
    """What is known of each distinct message before anybody answers it.

    Returns:
        By message: its own projections on every probe (the mean over its tokens, and the last prompt token), or what `embed` says
        of its text.

    Raises:
        MonitoringError: the embedding has another number of rows than messages, or is not finite.
    """
    distinct = list(dict.fromkeys(messages))
    if embed is not None:
        found = np.asarray(embed(distinct), dtype=np.float64)
        if found.ndim != 2 or len(found) != len(distinct) or not np.isfinite(found).all():
            raise MonitoringError(
                f"the embedding returned {found.shape} for {len(distinct)} messages: one finite row each is needed"
            )
        return dict(zip(distinct, found, strict=True))
    readings = read_turns(model, [_alone(model, message) for message in distinct], probes)
    return {m: np.concatenate([r.user[0], r.before[0]]) for m, r in zip(distinct, readings, strict=True)}


def _alone(model: ChatModel, message: str) -> Rendered:
    whole, (span,) = message_spans(model, [{"role": "user", "content": message}])
    return Rendered("a message alone", whole.ids, (Part(1, "user", *span),))
