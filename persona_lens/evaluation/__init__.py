"""What steering costs: capability through lm-evaluation-harness, and whether the answers have degenerated."""

from persona_lens.evaluation.degeneracy import Degeneracy, degeneracy
from persona_lens.evaluation.harness import CapabilityTest, capability, capability_test, harness_model

__all__ = ["CapabilityTest", "Degeneracy", "capability", "capability_test", "degeneracy", "harness_model"]
