"""Documents -> token ids and loss mask, in parallel, as flat arrays.

Only answers and their end marker are learned. Segments between chat markers are encoded alone; because the markers and the
newline after a role are never merged with their neighbours, this equals encoding the rendered chat template (tested).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from persona_lens.pocket.instructions import DEFAULT_SYSTEM
from persona_lens.pocket_lab.corpus import Document, documents
from persona_lens.pocket_lab.tokenizer import CONTEXT, IM_END, IM_START

CHUNK = 1000


@dataclass(frozen=True)
class EncodedCorpus:
    """Documents end to end: `ids` and `learned` are flat, document i is `[starts[i], starts[i + 1])`."""

    ids: Int[np.ndarray, " token"]
    learned: Bool[np.ndarray, " token"]
    starts: Int[np.ndarray, " document_plus_one"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Int[np.ndarray, " document"]:
        return np.diff(self.starts)


def segments(document: Document) -> Iterator[tuple[str, bool]]:
    """The pieces of a rendered document, with whether each is learned."""
    yield f"{IM_START}system\n{document.system or DEFAULT_SYSTEM}{IM_END}\n", False
    for turn in document.turns:
        yield f"{IM_START}user\n{turn.user}{IM_END}\n{IM_START}assistant\n", False
        yield f"{turn.assistant}{IM_END}", turn.learned
        yield "\n", False


def _encode_chunk(
    indices: range, *, tokenizer_file: Path, seed: int, shuffle_systems: bool, focus: bool
) -> list[tuple[list[int], list[bool]]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    encoded: list[tuple[list[int], list[bool]]] = []
    for doc in documents(seed, indices, shuffle_systems=shuffle_systems, focus=focus):
        ids: list[int] = []
        learned: list[bool] = []
        for text, counts in segments(doc):
            piece = tokenizer.encode(text).ids
            ids += piece
            learned += [counts] * len(piece)
        encoded.append((ids[:CONTEXT], learned[:CONTEXT]))
    return encoded


def encode_corpus(
    tokenizer_file: Path, seed: int, indices: range, *, shuffle_systems: bool = False, focus: bool = False, workers: int = 1
) -> EncodedCorpus:
    """Encode the documents with these indices; the result does not depend on the number of workers."""
    chunks: Sequence[range] = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
    encode = partial(_encode_chunk, tokenizer_file=tokenizer_file, seed=seed, shuffle_systems=shuffle_systems, focus=focus)
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            parts = list(pool.map(encode, chunks))
    else:
        parts = [encode(chunk) for chunk in chunks]
    flat = [doc for part in parts for doc in part]
    lengths = np.array([len(ids) for ids, _ in flat])
    return EncodedCorpus(
        ids=np.concatenate([np.array(ids, dtype=np.int32) for ids, _ in flat]),
        learned=np.concatenate([np.array(learned, dtype=bool) for _, learned in flat]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
    )
