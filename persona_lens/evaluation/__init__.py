"""What steering costs: capability through lm-evaluation-harness, and whether the answers have degenerated."""

from persona_lens.evaluation.degeneracy import Degeneracy, degeneracy
from persona_lens.evaluation.harness import capability, harness_model

__all__ = ["Degeneracy", "capability", "degeneracy", "harness_model"]
