"""Samplers by name, as the command line gives them: KIND:MODEL@URL, where the kind says how the server is asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from persona_lens.endpoints import endpoint_named
from persona_lens.errors import UnknownNameError
from persona_lens.models import ChatModel
from persona_lens.sampling.endpoint import EndpointSampler, endpoint_sampler
from persona_lens.sampling.wording import Wording, for_chat, for_llama_cpp, for_transformers, for_vllm

KINDS: Final[Mapping[str, Wording]] = {
    "vllm": for_vllm,
    "llama.cpp": for_llama_cpp,
    "transformers": for_transformers,
    "chat": for_chat,
}


def sampler_named(text: str, model: ChatModel, *, cache: Path | None = None) -> EndpointSampler:
    """The sampler that a text names, such as "vllm:Qwen/Qwen2.5-7B-Instruct@http://localhost:8000/v1".

    Raises:
        UnknownNameError: no such kind of server.
        EndpointError: a URL that cannot be used.
    """
    kind, _, name = text.partition(":")
    if kind not in KINDS or not name:
        raise UnknownNameError("sampler", text, [f"{known}:MODEL@URL" for known in KINDS])
    return endpoint_sampler(endpoint_named(name), model, KINDS[kind], cache=cache)
