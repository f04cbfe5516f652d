"""One client for every OpenAI-compatible server: retries, concurrency, and a cache that makes each call resumable.

Used wherever a model behind an endpoint is asked: judging, sampling answers, writing traits.
"""

from persona_lens.endpoints.asking import ask
from persona_lens.endpoints.cache import usage
from persona_lens.endpoints.request import Endpoint, Failed, Request, UnreadableReply, Usage, endpoint_named
from persona_lens.endpoints.wire import key_of

__all__ = ["Endpoint", "Failed", "Request", "UnreadableReply", "Usage", "ask", "endpoint_named", "key_of", "usage"]
