"""What steering costs: capability through lm-evaluation-harness, and whether the answers have degenerated."""

from persona_lens.evaluation.degeneracy import Degeneracy, degeneracy
from persona_lens.evaluation.harness import CapabilityTest, capability, capability_test, harness_model
from persona_lens.evaluation.scores import ScoreSettings, TraitScore, trait_answers, trait_scores

__all__ = [
    "CapabilityTest",
    "Degeneracy",
    "ScoreSettings",
    "TraitScore",
    "capability",
    "capability_test",
    "degeneracy",
    "harness_model",
    "trait_answers",
    "trait_scores",
]
