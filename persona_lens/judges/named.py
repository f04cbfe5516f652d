"""Judges by name, as the command line and the environment variable PERSONA_LENS_JUDGE give them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from persona_lens.endpoints import endpoint_named
from persona_lens.errors import PersonaLensError, UnknownNameError
from persona_lens.judges.endpoint import MODES, Mode, endpoint_judge
from persona_lens.judges.judge import Judge

if TYPE_CHECKING:
    from persona_lens.models import ChatModel

JUDGE_VARIABLE: Final = "PERSONA_LENS_JUDGE"  # names the judge of models that have none of their own
FORMS: Final = ("oracle", "openai:MODEL", "openai:MODEL@URL", "openai:MODEL@URL,digits", "openai:MODEL@URL,text", "local:MODEL")
Load = Callable[[str], "ChatModel"]


def judge_named(text: str, trait_set: str, *, cache: Path | None = None, repeats: int = 1, load: Load | None = None) -> Judge:
    """The judge that a text names.

    Args:
        text: "oracle"; "openai:MODEL", a model of the server at OPENAI_BASE_URL (OpenAI's own where that is not set);
            "openai:MODEL@URL", one of another server; either followed by ",digits" or ",text" where its replies are not to be
            read as in the paper (`endpoint_judge`'s modes); "local:MODEL", a model on this machine by what `load_model` takes.
        trait_set: the traits that are judged, "real" or "pocket"; the oracle reads the latter only.
        cache: the file that keeps a server's replies.
        repeats: of a judge behind a server, see `endpoint_judge`.
        load: loads the model of a local judge; default `load_model`.

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
        model, mode = _mode_of(name)
        return endpoint_judge(endpoint_named(model), mode=mode, cache=cache, repeats=repeats)
    if kind == "local" and name:
        from persona_lens.judges.local import local_judge
        from persona_lens.models import load_model

        return local_judge((load or load_model)(name))
    raise UnknownNameError("judge", text, FORMS)


def _mode_of(name: str) -> tuple[str, Mode]:
    """A server's model, and how its replies are read."""
    if misplaced := next((mode for mode in MODES if f",{mode}@" in name), None):
        raise PersonaLensError(f"judge openai:{name}: the mode stands at the end, as in openai:MODEL@URL,{misplaced}")
    model, comma, mode = name.rpartition(",")
    if not comma or not mode.isalpha():
        return name, "logprobs"
    if mode not in MODES:
        raise UnknownNameError(f"mode of judge openai:{name}", mode, MODES)
    return model, mode


def default_judge(trait_set: str, *, cache: Path | None = None, repeats: int = 1, load: Load | None = None) -> Judge:
    """The judge that needs no choice: the oracle on the pocket model, else the one that PERSONA_LENS_JUDGE names.

    Args:
        cache, repeats, load: as `judge_named`.

    Raises:
        PersonaLensError: any other model needs a judge to be named.
    """
    if trait_set == "pocket":
        return judge_named("oracle", trait_set)
    if named := os.environ.get(JUDGE_VARIABLE, "").strip():
        return judge_named(named, trait_set, cache=cache, repeats=repeats, load=load)
    raise PersonaLensError(
        f"no judge given, and the oracle reads pocket models only: name one by --judge or by the variable {JUDGE_VARIABLE} "
        "(openai:MODEL, openai:MODEL@URL or local:MODEL); from Python pass judge= (persona_lens.judges.scripted makes one of "
        "any scorer)"
    )
