"""Steering: interventions on the residual stream as values, plans that say what they touch, doses that say what they cost."""

from persona_lens.steering.dose import (
    Calibrated,
    calibrated_strength,
    next_token_divergence,
    next_token_divergences,
    relative_strength,
    residual_norms,
)
from persona_lens.steering.interventions import (
    Add,
    Band,
    Custom,
    Gate,
    Intervention,
    Rotate,
    Where,
    ablate,
    add,
    add_increments,
    cap,
    custom,
    rotate,
)
from persona_lens.steering.plan import Plan, Receipt, plan, row_plan, steer

__all__ = [
    "Add",
    "Band",
    "Calibrated",
    "Custom",
    "Gate",
    "Intervention",
    "Plan",
    "Receipt",
    "Rotate",
    "Where",
    "ablate",
    "add",
    "add_increments",
    "calibrated_strength",
    "cap",
    "custom",
    "next_token_divergence",
    "next_token_divergences",
    "plan",
    "relative_strength",
    "residual_norms",
    "rotate",
    "row_plan",
    "steer",
]
