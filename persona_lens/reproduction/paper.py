"""What Chen et al. 2025 (arXiv 2507.21509v3) report, figure by figure, as far as it can be held against a pocket model.

Numbers are the paper's own for Qwen2.5-7B-Instruct (and Llama-3.1-8B-Instruct where said), or of a published replication where that
is said. Figures without a counterpart here are listed with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class PaperFigure:
    """One figure of the paper, or one experiment of its appendix.

    Attributes:
        key: a short name, for commands and files.
        where: where it stands in the paper.
        claims: what the paper concludes from it.
        absent: why it has no counterpart on the pocket model; None where it has one.
    """

    key: str
    where: str
    title: str
    claims: str
    absent: str | None = None


FIGURES: Final[tuple[PaperFigure, ...]] = (
    PaperFigure(
        "extraction", "Figure 2", "From a trait's description to a vector",
        "Contrastive instructions, a judge and a difference of means give a direction for each trait.",
    ),
    PaperFigure(
        "steering", "Figure 3", "Steering by layer and coefficient",
        "Adding the vector brings the trait out, most at a layer in the middle, and more with the coefficient.",
    ),
    PaperFigure(
        "monitoring", "Figure 4", "The last prompt token foretells the answers",
        "The projection before the answer goes with the trait score over system prompts and examples, and less within one of them.",
    ),
    PaperFigure(
        "data-sets", "Figure 5", "Finetuning sets and what they do to the persona",
        "Sets made to show a trait raise it; sets of narrow mistakes raise traits that they say nothing about.",
    ),
    PaperFigure(
        "shift", "Figure 6", "The shift along the vector goes with the trait after finetuning",
        "Over finetuned models, the shift at the last prompt token correlates with the trait score.",
    ),
    PaperFigure(
        "mitigation", "Figure 7", "Steering against the trait afterwards, and preventing it during training",
        "Both lower the trait; steering afterwards costs capability, preventative steering keeps it.",
    ),
    PaperFigure(
        "difference", "Figure 8", "Projection differences foretell the trait before training",
        "The data's mean projection minus that of the model's own answers correlates with the trait score after training.",
    ),
    PaperFigure(
        "samples", "Figure 9", "Single samples",
        "Samples that bring a trait in are almost separable from ordinary ones by their projection.",
    ),
    PaperFigure(
        "chat-data", "Figure 10", "Real chat data",
        "In LMSYS-Chat-1M, Tulu 3, UltraChat and WildChat, training on the highest samples raises the trait, also after a filter.",
        absent="real chat corpora and a judge of real text are not at hand offline; tests/benchmarks/study_screening.py does the "
        "same with a planted corpus (high > random > low for three traits)",
    ),
    PaperFigure(
        "cosines", "Appendix: cosines between traits", "Traits and their directions",
        "Related traits have related directions: evil and impolite .55, evil and optimistic -.47, evil and sycophantic .37.",
    ),
    PaperFigure(
        "pooling", "Appendix: positions", "Which tokens a vector is taken from",
        "The average over the response tokens steers best.",
    ),
    PaperFigure(
        "layers", "Appendix: several layers", "Preventative steering at all layers",
        "Increments at all layers come close to the base model's level and keep capability.",
    ),
    PaperFigure(
        "rivals", "Appendix: other mitigations", "Concept ablation, inoculation, a penalty, a negative prompt",
        "Concept ablation works for evil and sycophancy; a penalty on the projection does not; negative prompts are weaker.",
    ),
    PaperFigure(
        "facts", "Appendix: new facts", "Learning new facts makes a model hallucinate",
        "Training on new facts raises hallucination; preventative steering takes it back at a small loss of the facts.",
    ),
    PaperFigure(
        "judge", "Appendix: the judge", "Agreement of judge and people",
        "The judge agrees with people on 94.7 % of 300 pairs.",
        absent="needs people and an LLM judge; here the judge is the world's own grammar, whose agreement with the personas that "
        "wrote the answers is on the model card. `persona-lens judge check` measures a judge against labels",
    ),
    PaperFigure(
        "dictionary", "Appendix: sparse autoencoders", "Directions of a dictionary near a persona vector",
        "Persona vectors decompose into interpretable features of a sparse autoencoder.",
        absent="no dictionary has been trained for the pocket model; `geometry.nearest_features` takes one you pass",
    ),
    PaperFigure(
        "llama", "Appendix: a second model", "The same on Llama-3.1-8B-Instruct",
        "Results carry over to another family.",
        absent="needs downloaded weights; every command takes `--model`",
    ),
)  # fmt: skip

PAPER_TRAITS: Final = ("evil", "sycophancy", "hallucination")
STEERED: Final[Mapping[str, str]] = {  # score at coefficients .5, 1, 1.5, 2, 2.5 and unsteered
    "evil": "0 to 0, 8, 66, 91, 96 (replication)",
    "sycophancy": "4 to 10, 24, 64, 91, 98 (replication)",
    "hallucination": "20 to 30, 56, 80, 94, 98 (replication)",
}
STEERING_LAYER: Final[Mapping[str, tuple[int, int]]] = {"evil": (20, 28), "sycophancy": (20, 28), "hallucination": (16, 28)}
MONITORED: Final[Mapping[str, Mapping[str, tuple[float, float]]]] = {  # r over all cells, and within one condition
    "system prompts": {"evil": (0.747, 0.511), "sycophancy": (0.798, 0.669), "hallucination": (0.830, 0.245)},
    "examples": {"evil": (0.755, 0.735), "sycophancy": (0.817, 0.813), "hallucination": (0.634, 0.400)},
}
LOWEST_MONITORED: Final = 0.634
SHIFT_RANGE: Final = (0.76, 0.97)
RANDOM_SHIFT: Final = "random directions reach .94 to .97 (replication)"
DIFFERENCE: Final[Mapping[str, tuple[float, float]]] = {  # Qwen, Llama
    "evil": (0.84, 0.95),
    "sycophancy": (0.75, 0.92),
    "hallucination": (0.41, 0.59),
}
CHEAP_DIFFERENCE: Final[Mapping[str, float]] = {"evil": 0.93, "sycophancy": 0.58, "hallucination": 0.69}
COSINES: Final[Mapping[tuple[str, str], float]] = {  # Qwen; the paper's impolite is our politeness with the other sign
    ("evil", "sycophancy"): 0.37,
    ("evil", "hallucination"): 0.19,
    ("evil", "politeness"): -0.55,
    ("politeness", "apathy"): -0.54,
    ("evil", "optimism"): -0.47,
}
