"""Monitoring: the persona before the model answers and while it does, with alarms whose false-positive rate is known.

`monitor` reads while the model runs, `read` whole conversations; `calibrate` makes alarms of neutral ones, `monitor_chats` applies
them to chats on disk, `predict` asks whether the persona is seen before the answer, beside what the text alone tells.
"""

from persona_lens.monitoring.baselines import length_baseline, text_baseline
from persona_lens.monitoring.calibration import (
    Alarms,
    Calibration,
    CalibrationSettings,
    Expectation,
    calibrate,
    content_of_messages,
    highest,
    load_calibration,
    users_of,
)
from persona_lens.monitoring.drift import ChangePoint, Trend, change_point, rise, trend
from persona_lens.monitoring.live import AnswerReading, Monitor, TokenReading, monitor
from persona_lens.monitoring.neutral import neutral_conversations
from persona_lens.monitoring.prediction import (
    Comparison,
    Correlations,
    Estimate,
    Outcomes,
    Predictor,
    RandomFloor,
    Skill,
    auroc,
    compare,
    correlations,
    random_floor,
)
from persona_lens.monitoring.probes import Probe, as_probes, probe
from persona_lens.monitoring.reading import THINKING, Part, Reading, Rendered, TurnReadings, read, read_turns, render
from persona_lens.monitoring.rendering import Shown, html_of, notebook, text_of
from persona_lens.monitoring.run import MonitorRun, WatchedChat, load_monitor_run, monitor_chats
from persona_lens.monitoring.study import (
    Condition,
    Prediction,
    PredictionRun,
    PredictionSettings,
    graded_conditions,
    load_prediction,
    predict,
    shot_conditions,
)
from persona_lens.transcripts import Transcripts, read_transcripts, write_transcripts

__all__ = [
    "THINKING",
    "Alarms",
    "AnswerReading",
    "Calibration",
    "CalibrationSettings",
    "ChangePoint",
    "Comparison",
    "Condition",
    "Correlations",
    "Estimate",
    "Expectation",
    "Monitor",
    "MonitorRun",
    "Outcomes",
    "Part",
    "Prediction",
    "PredictionRun",
    "PredictionSettings",
    "Predictor",
    "Probe",
    "RandomFloor",
    "Reading",
    "Rendered",
    "Shown",
    "Skill",
    "TokenReading",
    "Transcripts",
    "Trend",
    "TurnReadings",
    "WatchedChat",
    "as_probes",
    "auroc",
    "calibrate",
    "change_point",
    "compare",
    "content_of_messages",
    "correlations",
    "graded_conditions",
    "highest",
    "html_of",
    "length_baseline",
    "load_calibration",
    "load_monitor_run",
    "load_prediction",
    "monitor",
    "monitor_chats",
    "neutral_conversations",
    "notebook",
    "predict",
    "probe",
    "random_floor",
    "read",
    "read_transcripts",
    "read_turns",
    "render",
    "rise",
    "shot_conditions",
    "text_baseline",
    "text_of",
    "trend",
    "users_of",
    "write_transcripts",
]
