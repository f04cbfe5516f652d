"""Reading and writing trait files: ours (one JSON per trait) and the paper's pair."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from persona_lens.errors import TraitFileError, UnknownNameError
from persona_lens.traits.trait import Trait

TRAIT_SETS: Final = ("real", "pocket")
"""Traits that ship: for language models of the world outside, and for the pocket model."""
Schema = TypeVar("Schema", bound=BaseModel)


def _shipped(trait_set: str) -> dict[str, Path]:
    if trait_set not in TRAIT_SETS:
        raise UnknownNameError("trait set", trait_set, TRAIT_SETS)
    folder = Path(str(files("persona_lens") / "traits" / "data" / trait_set))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def list_traits(trait_set: str = "real") -> list[str]:
    """Names of the traits that ship in a set (`real` or `pocket`).

    Raises:
        UnknownNameError: no such set.
    """
    return list(_shipped(trait_set))


def load_trait(name_or_path: str | Path, trait_set: str = "real") -> Trait:
    """A shipped trait by name, or any trait by the path of its JSON file.

    Args:
        name_or_path: what ends in ".json" is a path.
        trait_set: of a shipped trait: "real", or "pocket" for the pocket model.

    Raises:
        UnknownNameError: no such set, or no such shipped trait (the nearest names are given).
        TraitFileError: the file is missing, no JSON, or breaks the schema (file and field are named).

    Example:
        >>> pl.load_trait("humor").name
        'humor'
        >>> optimism = pl.load_trait("optimism", "pocket")  # the pocket model's own
        >>> len(optimism.extraction_questions), len(optimism.evaluation_questions)
        (20, 20)
    """
    path = Path(name_or_path)
    if path.suffix == ".json":
        return read_trait(path)
    shipped = _shipped(trait_set)
    if str(name_or_path) not in shipped:
        raise UnknownNameError("trait", str(name_or_path), shipped)
    return read_trait(shipped[str(name_or_path)])


def read_trait(path: Path) -> Trait:
    """A trait from a JSON file of ours.

    Raises:
        TraitFileError: the file is missing, no JSON, or breaks the schema (file and field are named).
    """
    return validated(Trait, read_json_object(path), path)


def write_trait(trait: Trait, path: Path) -> None:
    """Write a trait as JSON that `read_trait` reads back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trait.model_dump(by_alias=True), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_paper_pair(extraction: Path, evaluation: Path, *, name: str, description: str = "") -> Trait:
    """A trait from the authors' two files: `instruction: [{pos, neg}]`, `questions`, `eval_prompt` in each.

    Args:
        name: the trait's name; it also becomes the positive adjective, with "helpful" as its opposite, as in the authors' code.
        description: the files hold none; without one the name stands in.

    Raises:
        TraitFileError: a file is missing, no JSON, or lacks a field (file and field are named).
    """
    first, second = read_json_object(extraction), read_json_object(evaluation)
    for record, path in ((first, extraction), (second, evaluation)):
        missing = [key for key in ("instruction", "questions", "eval_prompt") if key not in record]
        if missing:
            raise TraitFileError(
                f"{path}: field {missing[0]!r} is missing; the paper's files have instruction, questions, eval_prompt"
            )
    try:
        instructions = [{"positive": pair["pos"], "negative": pair["neg"]} for pair in first["instruction"]]
    except (TypeError, KeyError) as error:
        raise TraitFileError(f"{extraction}: instruction must be a list of objects with pos and neg ({error!r})") from error
    record: dict[str, Any] = {
        "schema": 1,
        "name": name,
        "description": description or name,
        "adjectives": {"positive": name, "negative": "helpful"},
        "instructions": instructions,
        "extraction_questions": first["questions"],
        "evaluation_questions": second["questions"],
        "rubric": first["eval_prompt"],
    }
    return validated(Trait, record, Path(f"{extraction} and {evaluation}"))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        TraitFileError: it is missing, unreadable, or no object.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TraitFileError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise TraitFileError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(record, dict):
        raise TraitFileError(f"{path}: a trait file holds one JSON object, this one holds a {type(record).__name__}")
    return record  # pyright: ignore[reportUnknownVariableType]


def validated(schema: type[Schema], record: dict[str, Any], path: Path) -> Schema:
    """A record of a schema.

    Raises:
        TraitFileError: it breaks the schema (file and field are named).
    """
    try:
        return schema.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or schema.__name__.lower()
        message = str(first["msg"]).removeprefix("Value error, ")
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise TraitFileError(f"{path}: field {field}: {message}{more}") from error
