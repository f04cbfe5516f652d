"""How a prompt is put to a server, one function per kind of server. A new server is a new function.

What a server would take from its own defaults (top-k, penalties, a date) is said explicitly. The tests run `transformers serve`;
the fields of vLLM and llama.cpp are taken from their source.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from persona_lens.endpoints import Request
from persona_lens.errors import EndpointError
from persona_lens.models import ChatModel, Message
from persona_lens.models.template import SWITCH, TEMPLATE_DATE


@dataclass(frozen=True, eq=False)
class Asked:
    """A conversation that is to be answered, and the token ids it is rendered to here.

    Attributes:
        name: the prompt's id; what errors call it.
    """

    name: str
    messages: tuple[Message, ...]
    ids: tuple[int, ...]


Wording = Callable[[ChatModel, Asked], Request]
"""How a server is asked: all but how tokens are drawn (max_tokens, temperature, top_p and seed)."""


def for_vllm(model: ChatModel, asked: Asked) -> Request:
    """Token ids there and back (`return_token_ids`, vLLM 0.10.2 or later)."""
    plain = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    ids = {"prompt": list(asked.ids), "return_token_ids": True, "stop_token_ids": list(model.stop_ids)}
    return Request("completions", {**ids, **plain})


def for_llama_cpp(model: ChatModel, asked: Asked) -> Request:  # noqa: ARG001
    """Token ids there, and back beside the log-probabilities, of llama.cpp's server. Where it stops is the GGUF file's say."""
    plain = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    return Request("completions", {"prompt": list(asked.ids), "logprobs": 1, **plain})


def for_transformers(model: ChatModel, asked: Asked) -> Request:
    """Rendered text to `transformers serve` and text back: it takes and gives no token ids.

    It honours seeds one request at a time only: give the endpoint a concurrency of 1 if samples shall come out again.

    Raises:
        EndpointError: the prompt's text does not encode to its token ids.
    """
    plain = {"do_sample": True, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    config = {**plain, "eos_token_id": list(model.stop_ids), "pad_token_id": model.pad_id}
    return Request("completions", {"prompt": _text(model, asked), "generation_config": json.dumps(config)})


def for_chat(model: ChatModel, asked: Asked) -> Request:
    """Messages, rendered by the server: for any OpenAI-compatible one. Its own defaults for top-k and penalties stay in force."""
    written = str(model.tokenizer.chat_template)
    options: dict[str, Any] = {"date_string": TEMPLATE_DATE} if "date_string" in written else {}
    options |= {SWITCH: model.template.thinking} if model.template.switchable else {}
    extra: Mapping[str, Any] = {"chat_template_kwargs": options} if options else {}
    return Request("chat/completions", {"messages": [dict(m) for m in asked.messages], **extra})


def _text(model: ChatModel, asked: Asked) -> str:
    """The text that a server with the same tokenizer encodes to the prompt's ids: without its BOS if encoding adds one."""
    for ids in (asked.ids, asked.ids[1:]):
        text = str(model.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if tuple(model.tokenizer(text)["input_ids"]) == asked.ids:  # pyright: ignore[reportArgumentType]
            return text
    raise EndpointError(f"{asked.name}: its text does not encode to its token ids, so it cannot be sent as text: send token ids")
