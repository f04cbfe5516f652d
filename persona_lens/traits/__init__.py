"""Traits: a name, a description, contrastive instructions, questions and a judge rubric - all data, read from JSON.

Two sets ship: `real` for language models of the world outside, `pocket` for the pocket model, which understands its own world
only. The paper's pair of files (extraction and evaluation) loads too.
"""

from persona_lens.traits.files import TRAIT_SETS, list_traits, load_trait, read_paper_pair, read_trait, write_trait
from persona_lens.traits.roles import Role, RoleSet, load_roles
from persona_lens.traits.trait import Adjectives, InstructionPair, Trait

__all__ = [
    "TRAIT_SETS",
    "Adjectives",
    "InstructionPair",
    "Role",
    "RoleSet",
    "Trait",
    "list_traits",
    "load_roles",
    "load_trait",
    "read_paper_pair",
    "read_trait",
    "write_trait",
]
