"""Chat templates: a conversation as token ids, with what templates leave open answered once and for all.

The date is fixed, so that the same conversation has the same ids on every day. Thinking is off unless asked for. A template that
knows no system prompt gets it at the beginning of the first user message. What a template must be - one BOS, a prompt that stays
a prefix when the answer is appended - is checked when a model is loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

from jinja2 import TemplateError

from persona_lens.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""`role` ("system", "user" or "assistant") and `content`."""
TEMPLATE_DATE: Final = "26 Jul 2024"  # what Llama 3 templates fall back to
SWITCH: Final = "enable_thinking"  # what templates of models that think on demand read
END_OF_THINKING: Final = "</think>"
_SYSTEM: Final = "Be brief."
_PROBE: Final = ({"role": "system", "content": _SYSTEM}, {"role": "user", "content": "How are you today?"})
_ANSWER: Final = {"role": "assistant", "content": "Fine, thank you."}
_AGAIN: Final = {"role": "user", "content": "And tomorrow?"}


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template and how it is used.

    Attributes:
        system_role: whether the template renders system prompts; if not, they begin the first user message.
        thinking: whether the model may think before it answers (of templates that leave the choice).
    """

    tokenizer: "PreTrainedTokenizerBase"
    system_role: bool = True
    thinking: bool = False

    @property
    def switchable(self) -> bool:
        """Whether thinking can be switched on and off."""
        return SWITCH in str(self.tokenizer.chat_template)

    def ids(self, messages: Sequence[Message], *, answered: bool = False, thinking: bool | None = None) -> list[int]:
        """Token ids of a conversation up to the point where the answer begins; with `answered`, of one that ends with an answer.

        Args:
            thinking: other than the template's own, to see how it renders answers that lie in the past.

        Raises:
            ValueError: the template refuses the conversation.
        """
        try:
            rendered = self._rendered(messages, answered, thinking, tokenize=True, return_dict=True)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return list(cast(Mapping[str, list[int]], rendered)["input_ids"])

    def text(self, messages: Sequence[Message], *, answered: bool = False, thinking: bool | None = None) -> str:
        """The same as text."""
        return str(self._rendered(messages, answered, thinking, tokenize=False))

    def split(self, ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What was thought, with its marks and the blank tokens after them, and what was answered.

        Without thinking all of it is the answer; thinking that never ends has none.
        """
        if not self.thinking:
            return (), tuple(ids)
        start = self.after_thoughts(ids)
        return (tuple(ids), ()) if start is None else (tuple(ids[:start]), tuple(ids[start:]))

    def after_thoughts(self, ids: Sequence[int]) -> int | None:
        """Where what follows the last end of thinking begins; None without one."""
        end = cast(int, self.tokenizer.convert_tokens_to_ids(END_OF_THINKING))
        if not self.thinking or end not in ids:
            return None
        start = len(ids) - list(reversed(ids)).index(end)
        while start < len(ids) and not str(self.tokenizer.decode([ids[start]])).strip():
            start += 1
        return start

    def conversation(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The messages as the template can render them."""
        return [dict(m) for m in (messages if self.system_role else _merged(messages))]

    def _rendered(self, messages: Sequence[Message], answered: bool, thinking: bool | None, **options: Any) -> Any:
        switch = {SWITCH: self.thinking if thinking is None else thinking} if self.switchable else {}
        return self.tokenizer.apply_chat_template(
            self.conversation(messages), add_generation_prompt=not answered, date_string=TEMPLATE_DATE, **switch, **options
        )


def _merged(messages: Sequence[Message]) -> Sequence[Message]:
    """The system prompt at the beginning of the first user message."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return messages
    return [{**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}, *messages[2:]]


def probe_ids(template: Template) -> list[int]:
    """Token ids of a short conversation that every usable template renders."""
    return template.ids(_PROBE)


def checked_template(tokenizer: "PreTrainedTokenizerBase", name: str, *, thinking: bool = False) -> Template:
    """A tokenizer's template, used in the first of two ways that keeps prompts: with its system role, or without.

    Raises:
        ModelLoadError: no chat template, or one that renders no system, user, assistant conversation in either way, drops the
            system prompt, changes the prompt when the answer is appended, or renders two BOS; or thinking that has no switch.
    """
    if not tokenizer.chat_template:
        raise ModelLoadError(f"{name} has no chat template: use a chat (instruct) model, or set tokenizer.chat_template")
    own = Template(tokenizer, thinking=thinking)
    _check_thinking(own, name)
    ways = (own, replace(own, system_role=False))
    faults = [_fault(template) for template in ways]
    usable = [template for template, fault in zip(ways, faults, strict=True) if fault is None]
    if not usable:
        raise ModelLoadError(f"the chat template of {name} {faults[0]}")
    template = next((t for t in usable if _keeps_turns(t)), usable[0])
    bos = tokenizer.bos_token_id
    n_bos = sum(token == bos for token in probe_ids(template))
    if bos is not None and n_bos > 1 and bos != tokenizer.eos_token_id:
        raise ModelLoadError(f"the chat template of {name} renders {n_bos} BOS tokens: there must be one")
    return template


def _check_thinking(template: Template, name: str) -> None:
    if not template.thinking:
        return
    if not template.switchable:
        raise ModelLoadError(f"the chat template of {name} has no switch for thinking ({SWITCH}): load it without thinking")
    if END_OF_THINKING not in template.tokenizer.get_vocab():
        raise ModelLoadError(f"{name} has no token {END_OF_THINKING}, so thinking cannot be told from the answer: load it without")


def _fault(template: Template) -> str | None:
    """What is wrong with a template; None if nothing is."""
    try:
        prompt, whole = template.text(_PROBE), template.text([*_PROBE, _ANSWER], answered=True)
    except Exception as error:  # jinja raises whatever the template asks for
        return f"cannot render a system, user, assistant conversation: {error}"
    if not whole.startswith(prompt):
        return "changes the prompt when the answer is appended: token spans would be wrong"
    return None if _SYSTEM in prompt else "leaves out the system prompt"


def _keeps_turns(template: Template) -> bool:
    """Whether a conversation that goes on keeps its earlier turns as they were (thinking may go)."""
    try:
        whole = template.text([*_PROBE, _ANSWER, _AGAIN])
        return any(whole.startswith(template.text(_PROBE, thinking=thinking)) for thinking in (None, True))
    except Exception:  # as above
        return False
