"""The hooked chat model: a Hugging Face chat model in a TransformerLens bridge, with exact token spans and seeded sampling."""

from persona_lens.models.chat_model import ChatModel, Message
from persona_lens.models.fingerprint import Fingerprint
from persona_lens.models.generation import EndReason, Generated, Sampling, generate_tokens, uniforms
from persona_lens.models.loading import load_model

__all__ = [
    "ChatModel",
    "EndReason",
    "Fingerprint",
    "Generated",
    "Message",
    "Sampling",
    "generate_tokens",
    "load_model",
    "uniforms",
]
