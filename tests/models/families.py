"""Tiny random-weight models of the families, each with its family's way to render a conversation."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from persona_lens.models import ChatModel

# templates are written with the marks of the pocket tokenizer
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}" + TURN + "{% endfor %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + ALTERNATING
    + OPEN
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (first if loop.first else '') + m['content'] | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + OPEN
)
LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set said = '' %}{% endif %}"
    "{{ '<|im_start|>system\n' + date_string + '\n\n' + said + '<|im_end|>\n' }}{% for m in messages %}"
    + TURN
    + "{% endfor %}"
    + OPEN
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}{% set messages = messages[1:] %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' and loop.last and said is defined %}"
    "{{ '<|im_start|>' + said + '\n\n' + m['content'] + '<|im_end|>' }}{% elif m['role'] == 'user' %}"
    "{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
PHI3 = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}" + OPEN
NEOX = "{% for m in messages %}{{ '<|im_start|>' if m['role'] != 'assistant' }}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% set c = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + c + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
CHATML = PHI3


@dataclass(frozen=True)
class Family:
    """An architecture of transformers, what its tiny config needs, and its template."""

    architecture: str
    template: str
    extra: dict[str, Any] = field(default_factory=dict)


GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
LLAMA_ROPE: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "qwen2": Family("qwen2", CHATML),
    "qwen3": Family("qwen3", QWEN3, {"head_dim": 16}),
    "llama3": Family("llama", LLAMA3, {"rope_parameters": LLAMA_ROPE}),
    "mistral": Family("mistral", MISTRAL, {"sliding_window": None}),
    "mistral-sliding": Family("mistral", MISTRAL, {"sliding_window": 24}),
    "gemma2": Family("gemma2", GEMMA2, GEMMA),
    "gemma3": Family("gemma3_text", GEMMA3, GEMMA),
    "phi3": Family("phi3", PHI3),
    "gpt-neox": Family("gpt_neox", NEOX),
}


def tiny(family: str, tokenizer: PreTrainedTokenizerBase, *, tied: bool = False, layers: int = 3, **extra: Any) -> PreTrainedModel:
    """A random model for the tokenizer's vocabulary."""
    torch.manual_seed(0)
    known = FAMILIES[family]
    config = AutoConfig.for_model(
        known.architecture, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0, tie_word_embeddings=tied, **known.extra, **extra,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def with_template(tokenizer: PreTrainedTokenizerBase, template: str, *, bos: bool = True) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    other.add_tokens(["<think>", "</think>"], special_tokens=True)
    if bos:
        other.bos_token = "<|endoftext|>"
    return other


def residuals(model: ChatModel, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda residual, hook: seen.__setitem__(layer, residual.clone())

    with torch.inference_mode(), model.hooks([(model.hook_name(i), keep(i)) for i in range(model.n_layers)]):
        logits = model.hf(ids, use_cache=False).logits
    return [seen[i] for i in range(model.n_layers)], logits
