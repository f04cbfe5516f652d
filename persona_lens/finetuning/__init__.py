"""Finetuning: training with interventions switched on, the shift it causes, and defences against it compared."""

from persona_lens.correlation import Outcome, ShiftCorrelation, correlate
from persona_lens.finetuning.adapters import adapted, unwrapped
from persona_lens.finetuning.comparison import Cell, Comparison, ComparisonSettings, defend, load_comparison
from persona_lens.finetuning.data import Example, Examples, encode, read_data
from persona_lens.finetuning.defences import (
    ORDINARY,
    Defence,
    Task,
    ablate_concept,
    inoculate,
    mix_in,
    negative_prompt,
    penalise,
    prevent,
    stay_near,
    steer_against,
)
from persona_lens.finetuning.dose import Balanced, Matched, Round, balanced_strengths, data_difference, matched_strengths
from persona_lens.finetuning.fit import answer_loss
from persona_lens.finetuning.foretold import family_of, foretold
from persona_lens.finetuning.penalties import Penalty, TrainingStep, penalise_divergence, penalise_projection
from persona_lens.finetuning.pilot import Pilot, PilotSettings, Recommendation, Tried, load_pilot, pilot
from persona_lens.finetuning.shift import READINGS, Shift, ShiftRun, ShiftSettings, applied, load_shift, shift
from persona_lens.finetuning.training import Finetuned, FinetuneSettings, default_settings, finetune, load_finetuned
from persona_lens.finetuning.watching import Watched, watched

__all__ = [
    "ORDINARY",
    "READINGS",
    "Balanced",
    "Cell",
    "Comparison",
    "ComparisonSettings",
    "Defence",
    "Example",
    "Examples",
    "FinetuneSettings",
    "Finetuned",
    "Matched",
    "Outcome",
    "Penalty",
    "Pilot",
    "PilotSettings",
    "Recommendation",
    "Round",
    "Shift",
    "ShiftCorrelation",
    "ShiftRun",
    "ShiftSettings",
    "Task",
    "TrainingStep",
    "Tried",
    "Watched",
    "ablate_concept",
    "adapted",
    "answer_loss",
    "applied",
    "balanced_strengths",
    "correlate",
    "data_difference",
    "default_settings",
    "defend",
    "encode",
    "family_of",
    "finetune",
    "foretold",
    "inoculate",
    "load_comparison",
    "load_finetuned",
    "load_pilot",
    "load_shift",
    "matched_strengths",
    "mix_in",
    "negative_prompt",
    "penalise",
    "penalise_divergence",
    "penalise_projection",
    "pilot",
    "prevent",
    "read_data",
    "shift",
    "stay_near",
    "steer_against",
    "unwrapped",
    "watched",
]
