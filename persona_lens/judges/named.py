"""Judges by name, as the command line and the environment variable PERSONA_LENS_JUDGE give them."""

from pathlib import Path
from typing import Final

from persona_lens.endpoints import endpoint_named
from persona_lens.errors import PersonaLensError, UnknownNameError
from persona_lens.judges.endpoint import Mode, endpoint_judge
from persona_lens.judges.judge import Judge

FORMS: Final = ("oracle", "openai:MODEL", "openai:MODEL@URL", "local:MODEL")


def judge_named(text: str, trait_set: str, *, cache: Path | None = None, mode: Mode = "logprobs", repeats: int = 1) -> Judge:
    """The judge that a text names.

    Args:
        text: "oracle"; "openai:MODEL", a model of the server at OPENAI_BASE_URL (OpenAI's own where that is not set);
            "openai:MODEL@URL", one of another server; "local:MODEL", a model on this machine by what `load_model` takes.
        trait_set: the traits that are judged, "real" or "pocket"; the oracle reads the latter only.
        cache: the file that keeps a server's replies.
        mode, repeats: of a judge behind a server, see `endpoint_judge`.

    Raises:
        UnknownNameError: a text of none of these forms.
        PersonaLensError: the oracle for other traits than its own; `EndpointError` and `ModelLoadError` as the judges raise them.
    """
    kind, _, name = text.partition(":")
    if text == "oracle":
        if trait_set != "pocket":
            raise PersonaLensError("the oracle reads answers of pocket models only: name another judge, such as openai:MODEL")
        from persona_lens.judges.oracle import oracle

        return oracle()
    if kind == "openai" and name:
        return endpoint_judge(endpoint_named(name), mode=mode, cache=cache, repeats=repeats)
    if kind == "local" and name:
        from persona_lens.judges.local import local_judge
        from persona_lens.models import load_model

        return local_judge(load_model(name))
    raise UnknownNameError("judge", text, FORMS)
