"""The paper's vectors and traits (Chen et al. 2025; the authors' `generate_vec.py` and `data_generation`).

`{trait}_response_avg_diff.pt` (also `prompt_avg`, `prompt_last`) is a bare fp32 tensor [n_layers + 1, d_model], one row per entry
of Hugging Face's `hidden_states`: row 0 the embeddings, row l + 1 the output of block l, our layer l. The last entry is taken
after the final norm, so the last row is no residual of our last layer: it is kept apart, and the vectors are zero there.
"""

import re
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.errors import ExchangeError
from persona_lens.exchange.imported import UNKNOWN, Imported, Origin, imported, listed, require_name, zero_layers
from persona_lens.exchange.untrusted import as_tensor, load_pt
from persona_lens.store import write_atomically, write_json
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors, hook_name

if TYPE_CHECKING:
    from persona_lens.models import ChatModel

POOLINGS: Final = {"response_avg": "response_mean", "prompt_avg": "prompt_mean", "prompt_last": "prompt_last"}
_FILE_NAME: Final = re.compile(rf"(?P<trait>.+)_(?P<pooling>{'|'.join(POOLINGS)})_diff\.pt")


def read_paper_vectors(
    path: str | Path, *, trait: str | None = None, model: "ChatModel | None" = None, lineage: str = ""
) -> Imported:
    """Vectors from the authors' tensor file.

    Args:
        trait: default: what the file's name says (`evil_response_avg_diff.pt`), which also says the pooling.
        model: the model they were made on; its shape is checked and its lineage taken over.

    Returns:
        The vectors with row l + 1 as layer l; row 0 as `embedding`; the last row as `post_norm`, and zero in the vectors.

    Raises:
        ExchangeError: no such file, no bare tensor of at least two rows, or not of the model's shape.
        LineageError: model and lineage contradict each other.
    """
    path = Path(path)
    rows = as_tensor(load_pt(path), path, "the tensor", 2)
    if len(rows) < 2:
        raise ExchangeError(f"{path}: has one row, the paper's files have the embeddings and one row per block")
    named = _FILE_NAME.fullmatch(path.name)
    last = len(rows) - 2
    directions = rows[1:].clone()
    directions[last] = 0.0
    notes = (
        "estimator, thresholds, seeds and the rollouts behind it are not in the file",
        "no question differences, reliability, norms or p values: they are NaN or empty",
        f"{hook_name(last)} was read after the final norm and is zero here: nothing will use it; the row is kept as post_norm",
    )
    return imported(
        directions,
        Origin(model, lineage, trait),
        what=str(path),
        file_format="paper",
        trait=named["trait"] if named else path.stem,
        pooling=POOLINGS[named["pooling"]] if named else UNKNOWN,
        estimator="paper",
        notes=notes,
        embedding=rows[0].clone(),
        post_norm_layer=last,
        post_norm=rows[-1].clone(),
    )


def paper_file_name(vectors: PersonaVectors) -> str:
    """What the authors' code would call the file.

    Raises:
        ExchangeError: their code has no such pooling, or the trait's name is no part of a file name.
    """
    theirs = {ours: name for name, ours in POOLINGS.items()}
    if vectors.pooling not in theirs:
        raise ExchangeError(f"the authors' code has no pooling {vectors.pooling!r}: it has {', '.join(theirs)}")
    return f"{require_name(vectors.trait, 'the vectors')}_{theirs[vectors.pooling]}_diff.pt"


def write_paper_vectors(
    vectors: PersonaVectors, path: str | Path, *, embedding: Float[Tensor, " d_model"] | None = None
) -> tuple[str, ...]:
    """Write the authors' tensor file.

    Args:
        path: the file, or an existing folder in which it gets the name that the authors' code looks for.
        embedding: row 0; default: zeros.

    Returns:
        Notes on what the format cannot hold.

    Raises:
        ExchangeError: an embedding of another width, or vectors whose pooling or trait gives no file name in a folder.
    """
    path = Path(path)
    path = path / paper_file_name(vectors) if path.is_dir() else path
    if embedding is not None and tuple(embedding.shape) != (vectors.d_model,):
        raise ExchangeError(f"the embedding has shape {tuple(embedding.shape)}, the vectors have {vectors.d_model} dimensions")
    row = torch.zeros(vectors.d_model) if embedding is None else embedding
    rows = torch.cat([row[None].float().cpu(), vectors.directions.float().cpu()]).contiguous()
    write_atomically(path, lambda temporary: torch.save(rows, temporary))
    notes = [
        "the format holds a bare tensor: trait and pooling are in the file's name only, all else is lost (lineage, differences, "
        "reliability, norms, p values, provenance)",
        f"the last row is {hook_name(vectors.n_layers - 1)} before the final norm; the authors' own files have it after that norm",
    ]
    if embedding is None:
        notes.append("row 0, the embeddings, is zeros")
    if vectors.estimator != "paper":
        notes.append(f"the estimator is {vectors.estimator}, not the authors' pooled means")
    if absent := zero_layers(vectors):
        notes.append(f"rows of zeros stand for {listed(absent)}")
    return tuple(notes)


def write_paper_pair(trait: Trait, extraction: str | Path, evaluation: str | Path) -> tuple[str, ...]:
    """Write a trait as the authors' two files (`traits.read_paper_pair` reads them back).

    Returns:
        Notes on what the format cannot hold.

    Raises:
        ExchangeError: both paths are the same.
    """
    first, second = Path(extraction), Path(evaluation)
    if first.resolve() == second.resolve():
        raise ExchangeError(f"{first}: extraction and evaluation need two files")
    instructions = [{"pos": pair.positive, "neg": pair.negative} for pair in trait.instructions]
    for path, questions in ((first, trait.extraction_questions), (second, trait.evaluation_questions)):
        record: dict[str, Any] = {"instruction": instructions, "questions": list(questions), "eval_prompt": trait.rubric}
        write_json(path, record)
    return tuple(_not_held(trait))


def _not_held(trait: Trait) -> list[str]:
    """What the authors' pair of files has no place for."""
    notes = [f"the name is in neither file: the authors' code takes it from their names, which should be {trait.name}.json"]
    if trait.description != trait.name:
        notes.append("the description is lost")
    adjectives = trait.adjectives
    if adjectives is None:
        notes.append(f"the instructions stand alone here; the authors' code puts 'You are a {trait.name} assistant.' before them")
    elif (adjectives.positive, adjectives.negative) != (trait.name, "helpful"):
        notes.append(
            f"the adjectives {adjectives.positive!r} and {adjectives.negative!r} are lost: the authors' code takes them as "
            "assistant_name"
        )
    if trait.graded:
        notes.append("the graded system prompts are lost")
    if not _formats(trait.rubric):
        notes.append("the rubric has braces besides {question} and {answer}: the authors' str.format will stumble over them")
    return notes


def _formats(rubric: str) -> bool:
    """Whether `str.format` finds the two placeholders in a rubric and nothing else."""
    try:
        fields = [name for _, name, spec, conversion in Formatter().parse(rubric) if name is not None or spec or conversion]
    except ValueError:
        return False
    return sorted(map(str, fields)) == ["answer", "question"]
