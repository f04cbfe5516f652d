"""Baking: a model steered by `add` as plain Hugging Face weights, for programs that know no hooks."""

from persona_lens.baking.export import PROVENANCE, Baked, bake

__all__ = ["PROVENANCE", "Baked", "bake"]
