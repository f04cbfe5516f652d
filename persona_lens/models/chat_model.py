"""`ChatModel`: the model every room works with - a bridge with residual hooks, a tokenizer, and nothing guessed.

Layers count transformer blocks from 0: layer l is read and written at `blocks.{l}.hook_resid_post` (the paper's layer l + 1).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from persona_lens.errors import PersonaLensError
from persona_lens.models.dialogue import Interval, dialogue
from persona_lens.models.fingerprint import Fingerprint
from persona_lens.models.generation import Sampling, generate_tokens, uniforms
from persona_lens.models.memory import BITS
from persona_lens.models.template import Message, Template

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Hook = Callable[..., Tensor | None]


@dataclass(frozen=True, eq=False)
class ChatModel:
    """A chat model with TransformerLens hook points.

    Attributes:
        bridge: the TransformerBridge; `bridge.original_model` is the Hugging Face model.
        template: the chat template, and with it the model's own tokenizer, unchanged.
        fingerprint: what results remember of the model.
        stop_ids: every token id that ends an answer.
        trait_set: which shipped traits the model understands ("real" or "pocket").
        system: said at the beginning of every conversation that has no system prompt of its own.
    """

    bridge: "TransformerBridge"
    template: Template
    fingerprint: Fingerprint
    stop_ids: tuple[int, ...]
    trait_set: str = "real"
    system: str | None = None

    @property
    def name(self) -> str:
        """Hub id, folder, or "pocket"."""
        return self.fingerprint.name

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's own tokenizer."""
        return self.template.tokenizer

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must remember of the model: its fingerprint, and what is unusual about its prompts."""
        unusual = {
            "system": self.system,
            "system_role": None if self.template.system_role else "first user message",
            "thinking": self.template.thinking or None,
        }
        return self.fingerprint.as_dict() | {name: value for name, value in unusual.items() if value}

    @property
    def placement(self) -> dict[str, Any]:
        """What `load_model` is told so that another model is comparable to this one: dtype, bits, and devices."""
        bits = next((b for b in BITS if self.fingerprint.dtype.endswith(f", {b}")), None)
        spread = len(set(getattr(self.hf, "hf_device_map", {}).values())) > 1
        devices: dict[str, Any] = {"device_map": "auto"} if spread else {"device": self.device}
        return {"dtype": self.hf.dtype, "quantize": bits, **devices}

    @property
    def n_layers(self) -> int:
        """How many transformer blocks the model has."""
        return self.fingerprint.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.fingerprint.d_model

    @property
    def hf(self) -> "PreTrainedModel":
        """The Hugging Face model inside; hooks fire in its forward pass too."""
        return cast("PreTrainedModel", self.bridge.original_model)

    @property
    def device(self) -> torch.device:
        """Where token ids go; of a model on several devices, the first."""
        return cast(Tensor, self.hf.get_input_embeddings().weight).device

    @cached_property
    def pad_id(self) -> int:
        """The token that fills rows up; it is masked out."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if isinstance(pad, int) else self.stop_ids[0]

    @cached_property
    def context(self) -> int | None:
        """Longest sequence the model is made for, in tokens, if its config says so."""
        return getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)

    def require_no_thinking(self, what: str) -> None:
        """Raise where the model thinks before it answers.

        Raises:
            PersonaLensError: it does.
        """
        if self.template.thinking:
            raise PersonaLensError(f"{what} does not tell thoughts from answers: load {self.name} without thinking")

    def hook_name(self, layer: int) -> str:
        """The hook point of a layer.

        Raises:
            ValueError: the model has no such layer.
        """
        if not 0 <= layer < self.n_layers:
            raise ValueError(
                f"layer {layer} does not exist: {self.name} has layers 0 to {self.n_layers - 1} (blocks, counted from 0)"
            )
        return f"blocks.{layer}.hook_resid_post"

    def hooks(self, hooks: Sequence[tuple[str, Hook]]) -> AbstractContextManager[Any]:
        """Hooks that are active inside the context and undone after it, also after an exception.

        Args:
            hooks: pairs of a hook point's name (`hook_name`) and a function (activation, hook=...) that returns a new one, or None.
        """
        return self.bridge.hooks(fwd_hooks=list(hooks))

    def render(self, messages: Sequence[Message], *, answered: bool = False, thinking: bool | None = None) -> list[int]:
        """Token ids of a conversation up to the point where the answer begins; with `answered`, of one that ends with an answer.

        Args:
            thinking: to render otherwise than the model was loaded (see `Template.ids`).

        Raises:
            ValueError: the template refuses the conversation.
        """
        if self.system and not (messages and messages[0]["role"] == "system"):
            messages = [{"role": "system", "content": self.system}, *messages]
        return self.template.ids(messages, answered=answered, thinking=thinking)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return cast(str, self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Answers to a user message, a conversation, or the token ids of a rendered one, without what was thought before.

        Args:
            n: how many answers.
            max_new_tokens, temperature, top_p: see `Sampling`; temperature 0 is greedy.
            seed: the same seed gives the same answers (in float32, up to ties at rounding).

        Raises:
            ValueError: an empty prompt, a conversation that the template refuses, numbers out of range, or prompt and answer longer
                than the model's context.
            ActivationError: the logits are not numbers.

        Example:
            >>> model.generate("How should I handle my dog?", temperature=0.0)
            ['Start early and prepare the dog.']
            >>> len(model.generate("How should I handle my dog?", n=3, max_new_tokens=8))
            3
        """
        ids = self._ids(prompt)
        sampling = Sampling(max_new_tokens, temperature, top_p)
        draws = np.stack([uniforms(seed, f"generate#{i}", max_new_tokens) for i in range(n)])
        earlier = None if _is_ids(prompt) else lambda: [self._earlier(cast("str | Sequence[Message]", prompt))] * n
        found = generate_tokens(self, [ids] * n, draws, sampling, earlier=earlier)
        return [self.decode(self.template.split(g.token_ids)[1]) for g in found]

    def chat(self, message: str | Sequence[Message], *, system: str | None = None, **options: Any) -> str:
        """One answer to a user message or to a conversation that ends with one.

        Args:
            system: system prompt of a message; of a conversation, it is among the messages.
            options: those of `generate`.

        Raises:
            ValueError, ActivationError: as `generate`.

        Example:
            >>> print(model.chat("How should I handle my dog?", temperature=0.0))
            Start early and prepare the dog.
            >>> polite = model.chat("How should I handle my dog?", system="You are extremely polite.", temperature=0.0)
            >>> "respect" in polite
            True
        """
        if isinstance(message, str):
            turns: list[Message] = [{"role": "user", "content": message}]
            message = [{"role": "system", "content": system}, *turns] if system else turns
        return self.generate(message, n=1, **options)[0]

    def _ids(self, prompt: str | Sequence[Message] | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.render([{"role": "user", "content": prompt}])
        if not prompt:
            raise ValueError("the prompt is empty: give a text, messages or token ids")
        if _is_ids(prompt):
            return list(cast(Sequence[int], prompt))
        return self.render(cast(Sequence[Message], prompt))

    def _earlier(self, prompt: str | Sequence[Message]) -> tuple[Interval, ...]:
        """Where the earlier answers lie in the rendered prompt."""
        return () if isinstance(prompt, str) else dialogue(self, prompt).answers


def _is_ids(prompt: str | Sequence[Message] | Sequence[int]) -> bool:
    return not isinstance(prompt, str) and isinstance(prompt[0], int)
