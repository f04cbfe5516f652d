"""Prompts -> rollouts: sampled answers with their token ids, each from its own seed; scripts -> conversations."""

from persona_lens.sampling.conversations import Conversation, Script, converse
from persona_lens.sampling.endpoint import EndpointSampler, endpoint_sampler
from persona_lens.sampling.local import DEFAULT_BATCH_ROWS, sample
from persona_lens.sampling.named import sampler_named
from persona_lens.sampling.rollout import Rollout, Row, rows_of
from persona_lens.sampling.sampler import Sampler, sampled
from persona_lens.sampling.wording import Asked, Wording, for_chat, for_llama_cpp, for_transformers, for_vllm

__all__ = [
    "DEFAULT_BATCH_ROWS",
    "Asked",
    "Conversation",
    "EndpointSampler",
    "Rollout",
    "Row",
    "Sampler",
    "Script",
    "Wording",
    "converse",
    "endpoint_sampler",
    "for_chat",
    "for_llama_cpp",
    "for_transformers",
    "for_vllm",
    "rows_of",
    "sample",
    "sampled",
    "sampler_named",
]
