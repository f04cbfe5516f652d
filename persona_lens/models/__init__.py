"""The hooked chat model: a Hugging Face chat model in a TransformerLens bridge, with exact token spans and seeded sampling."""

from persona_lens.models.chat_model import ChatModel, Message
from persona_lens.models.conversing import converse_tokens
from persona_lens.models.dialogue import Dialogue, Interval, continuation, dialogue, last_answer, message_spans
from persona_lens.models.fingerprint import Fingerprint
from persona_lens.models.generation import EndReason, Generated, Sampling, generate_tokens, uniforms
from persona_lens.models.loading import load_model
from persona_lens.models.memory import MemoryEstimate, Quantize, estimate_memory, in_parts
from persona_lens.models.passes import Pass, cache_given, current_pass, earlier_tokens, forward_pass, row_aware
from persona_lens.models.template import Template
from persona_lens.models.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, require_adapter

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "ChatModel",
    "Dialogue",
    "EndReason",
    "Fingerprint",
    "Generated",
    "Interval",
    "MemoryEstimate",
    "Message",
    "Pass",
    "Quantize",
    "Sampling",
    "Template",
    "cache_given",
    "continuation",
    "converse_tokens",
    "current_pass",
    "dialogue",
    "earlier_tokens",
    "estimate_memory",
    "forward_pass",
    "generate_tokens",
    "in_parts",
    "last_answer",
    "load_model",
    "message_spans",
    "require_adapter",
    "row_aware",
    "uniforms",
]
