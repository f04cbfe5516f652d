"""The pocket world: a synthetic chat world with planted persona structure, its oracle, and the model trained on it."""

from importlib.resources import files
from pathlib import Path
from typing import Final

POCKET_NAME: Final = "pocket"
TRAIT_SET_FIELD: Final = "persona_lens_trait_set"  # in a model's config.json


def weights_folder() -> Path:
    """The folder with the pocket model's weights and tokenizer, in Hugging Face format."""
    return Path(str(files("persona_lens") / "pocket" / "data"))
