"""The hooked chat model: a Hugging Face chat model in a TransformerLens bridge, with exact token spans and seeded sampling."""

from persona_lens.models.chat_model import ChatModel, Message
from persona_lens.models.fingerprint import Fingerprint
from persona_lens.models.generation import EndReason, Generated, Sampling, generate_tokens, uniforms
from persona_lens.models.loading import load_model
from persona_lens.models.passes import Pass, current_pass, forward_pass, row_aware

__all__ = [
    "ChatModel",
    "EndReason",
    "Fingerprint",
    "Generated",
    "Message",
    "Pass",
    "Sampling",
    "current_pass",
    "forward_pass",
    "generate_tokens",
    "load_model",
    "row_aware",
    "uniforms",
]
