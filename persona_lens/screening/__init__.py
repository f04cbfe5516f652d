"""Training data -> which data sets and which samples will change the persona (Chen et al. 2025, section 6)."""

from persona_lens.screening.agreement import Agreement, Auc, auc
from persona_lens.screening.calibration import Predicted
from persona_lens.screening.directions import Direction
from persona_lens.screening.engines import Engine, local, on_ray
from persona_lens.screening.flagging import FlagCount, FlaggedSample, Flags, flag, load_flags
from persona_lens.screening.ranking import load_predictions, predict, ranking, row_scores
from persona_lens.screening.rivals import Rival, TextClassifier, classifier_of, judge_rival, text_classifier
from persona_lens.screening.run import SIGNALS, Extreme, ScreenRun, Signal, load_screen, screen
from persona_lens.screening.samples import Threshold, combine
from persona_lens.screening.scoring import ScreenSettings
from persona_lens.screening.sets import Ranked, Ranking, RowScores, SetScore
from persona_lens.screening.sources import Data, open_data

__all__ = [
    "SIGNALS",
    "Agreement",
    "Auc",
    "Data",
    "Direction",
    "Engine",
    "Extreme",
    "FlagCount",
    "FlaggedSample",
    "Flags",
    "Predicted",
    "Ranked",
    "Ranking",
    "Rival",
    "RowScores",
    "ScreenRun",
    "ScreenSettings",
    "SetScore",
    "Signal",
    "TextClassifier",
    "Threshold",
    "auc",
    "classifier_of",
    "combine",
    "flag",
    "judge_rival",
    "load_flags",
    "load_predictions",
    "load_screen",
    "local",
    "on_ray",
    "open_data",
    "predict",
    "ranking",
    "row_scores",
    "screen",
    "text_classifier",
]
