"""Role sets: characters that a model is asked to play, and the questions that all of them answer (arXiv 2601.10387)."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from persona_lens.traits.files import read_json_object, validated
from persona_lens.traits.trait import Strict, Text

RoleName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9 _-]{0,63}$")]


class Role(Strict):
    """A character: system prompts that ask for it."""

    name: RoleName
    instructions: tuple[Text, ...] = Field(min_length=1)


class RoleSet(Strict):
    """Roles that answer the same questions, and the rubric that says how far an answer is in its role (0-3)."""

    schema_version: int = Field(default=1, alias="schema", ge=1, le=1)
    name: RoleName
    roles: tuple[Role, ...] = Field(min_length=1)
    questions: tuple[Text, ...] = Field(min_length=2)
    rubric: Text

    @model_validator(mode="after")
    def _distinct(self) -> "RoleSet":
        for what, values in (("roles", [r.name for r in self.roles]), ("questions", list(self.questions))):
            twice = sorted({v for v in values if values.count(v) > 1})
            if twice:
                raise ValueError(f"{what} are given twice: {', '.join(twice)}")
        return self


def load_roles(name_or_path: str | Path = "real") -> RoleSet:
    """The role set that ships for real models ("real") or the pocket model ("pocket"), or one of your own by its path.

    Raises:
        TraitFileError: the file is missing, no JSON, or breaks the schema (file and field are named).
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = Path(str(files("persona_lens") / "traits" / "data" / "roles" / f"{name_or_path}.json"))
    return validated(RoleSet, read_json_object(path), path)
