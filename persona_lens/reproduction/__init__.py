"""The experiments of Chen et al. 2025 (arXiv 2507.21509) on the pocket model, figure by figure, beside what the paper reports."""

from persona_lens.reproduction.bench import FULL, QUICK, Scale
from persona_lens.reproduction.finding import Finding, Row
from persona_lens.reproduction.paper import FIGURES, PaperFigure
from persona_lens.reproduction.run import Reproduction, load_reproduction, reproduce

__all__ = [
    "FIGURES",
    "FULL",
    "QUICK",
    "Finding",
    "PaperFigure",
    "Reproduction",
    "Row",
    "Scale",
    "load_reproduction",
    "reproduce",
]
