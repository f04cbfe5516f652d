"""lm-evaluation-harness on a hooked chat model, steered or not (extra `eval`).

The harness asks for log-likelihoods of continuations and for greedy answers. Contexts and continuations stay apart as token ids,
so that steering "the response" means the last context token and the continuation, as when the model answers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch

from persona_lens.activations import DEFAULT_BATCH_TOKENS, Span, right_pad, span_pass, token_batches
from persona_lens.errors import PersonaLensError
from persona_lens.models import ChatModel, Sampling, forward_pass, generate_tokens, uniforms
from persona_lens.steering import Intervention, steer


@dataclass(frozen=True)
class CapabilityTest:
    """Something that measures what a model can do: its name (part of a run's identity), and task -> metric -> value."""

    name: str
    measure: Callable[[ChatModel], Mapping[str, Mapping[str, float]]]


def capability_test(
    tasks: Sequence[str], *, include: Path | None = None, limit: int | None = None, seed: int = 0
) -> CapabilityTest:
    """`capability` on these tasks, checked now and measured later.

    Args:
        tasks, include, limit, seed: as `capability`.

    Raises:
        PersonaLensError: the extra is not installed, or no task of that name exists.
    """
    _known_tasks(tasks, include)
    name = f"{','.join(tasks)}" + (f" ({limit} documents each)" if limit else "")
    return CapabilityTest(name, lambda model: capability(model, tasks, include=include, limit=limit, seed=seed))


def capability(
    model: ChatModel,
    tasks: Sequence[str],
    *interventions: Intervention,
    include: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = True,
) -> dict[str, dict[str, float]]:
    """Metrics per task of the model as it is, or steered.

    Args:
        tasks: names of harness tasks, for instance "mmlu"; needs the network or a cache, except for tasks of your own.
        include: folder with task files (YAML) of your own.
        limit: documents per task.
        chat: put questions through the chat template.

    Returns:
        Task -> metric -> value, as the harness reports them.

    Raises:
        PersonaLensError: the extra is not installed, or no task of that name exists.
    """
    manager = _known_tasks(tasks, include)
    with steer(model, *interventions):
        found = _harness("lm_eval").simple_evaluate(
            harness_model(model),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=chat,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    results = cast("dict[str, dict[str, Any]]", found["results"])
    return {
        task: {
            name.split(",")[0]: float(value) for name, value in metrics.items() if "," in name and isinstance(value, int | float)
        }
        for task, metrics in results.items()
    }


def _known_tasks(tasks: Sequence[str], include: Path | None) -> Any:
    """The harness's task manager, after checking that it knows the tasks."""
    manager = _harness("lm_eval.tasks").TaskManager(include_path=str(include) if include else None)
    unknown = [repr(t) for t in tasks if t not in manager.all_tasks]
    if unknown or not tasks:
        raise PersonaLensError(f"lm-evaluation-harness knows no task {', '.join(unknown) or 'at all'}: see `lm-eval ls tasks`")
    return manager


def harness_model(model: ChatModel, *, batch_tokens: int = DEFAULT_BATCH_TOKENS) -> Any:
    """The model as an `lm_eval.api.model.LM`; run it inside `steer(...)` to evaluate it steered.

    Args:
        batch_tokens: padded tokens per forward pass.

    Raises:
        PersonaLensError: the extra is not installed. Perplexity tasks raise it when they run: they are not supported.
    """

    class HarnessModel(_harness("lm_eval.api.model").LM):
        """Log-likelihoods and greedy answers of a ChatModel."""

        @property
        def tokenizer_name(self) -> str:
            return model.name

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            spans = [_split(model, i, *r.args) for i, r in enumerate(requests)]
            found: list[tuple[float, bool]] = [(0.0, False)] * len(spans)
            for indices in token_batches(spans, batch_tokens):
                for i, value in zip(indices, _likelihoods(model, [spans[i] for i in indices]), strict=True):
                    found[i] = value
            return found

        def loglikelihood_rolling(self, requests: Any) -> list[float]:  # noqa: ARG002
            raise PersonaLensError("perplexity tasks are not supported for chat models: choose tasks with answers")

        def generate_until(self, requests: Any) -> list[str]:
            return [_greedy(model, *r.args) for r in requests]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if model.system and chat_history[0]["role"] != "system":
                chat_history = [{"role": "system", "content": model.system}, *chat_history]
            return str(
                model.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)
            )

        def chat_template(self, chat_template: bool | str = False) -> str:
            return str(model.tokenizer.chat_template) if chat_template else ""

    return HarnessModel()


def _harness(module: str) -> Any:
    """A module of the harness, which is optional.

    Raises:
        PersonaLensError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise PersonaLensError("capability needs lm-evaluation-harness: pip install 'persona-lens[eval]'") from error


def _ids(model: ChatModel, text: str) -> list[int]:
    return list(cast(Any, model.tokenizer)(text, add_special_tokens=False)["input_ids"])


def _split(model: ChatModel, number: int, context: str, continuation: str) -> Span:
    """Token ids of a context and its continuation; trailing spaces of the context belong to the continuation."""
    trimmed = context.rstrip(" ")
    continuation = context[len(trimmed) :] + continuation
    prompt = _ids(model, trimmed) or [model.stop_ids[0]]
    whole = _ids(model, trimmed + continuation)
    answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else _ids(model, continuation)
    return Span(f"request {number}", tuple(prompt), tuple(answer))


@torch.inference_mode()
def _likelihoods(model: ChatModel, spans: Sequence[Span]) -> list[tuple[float, bool]]:
    """Summed log-probability of each answer, and whether it is the greedy one."""
    ids, mask = (x.to(model.device) for x in right_pad(spans, model.pad_id))
    # the harness hands over text: earlier answers of a few-shot dialogue cannot be told apart, so steering them is refused
    with forward_pass(replace(span_pass(spans, ids.shape[1], model.device), earlier=None)):
        logits = model.hf(ids, attention_mask=mask, use_cache=False).logits
    found: list[tuple[float, bool]] = []
    for row, span in enumerate(spans):
        p, n = len(span.prompt), len(span)
        scores = logits[row, p - 1 : n - 1].float().log_softmax(-1)
        targets = ids[row, p:n]
        chosen = scores.gather(-1, targets[:, None])[:, 0]
        found.append((float(chosen.double().sum()), bool((scores.argmax(-1) == targets).all())))
    return found


def _greedy(model: ChatModel, context: str, options: dict[str, Any]) -> str:
    """A greedy answer, cut at the first of the stop strings."""
    sampling = Sampling(int(options.get("max_gen_toks", 256)), temperature=0.0)
    draws = uniforms(0, "harness", sampling.max_new_tokens)[None]
    [found] = generate_tokens(model, [_ids(model, context) or [model.stop_ids[0]]], draws, sampling)
    text = model.decode(model.template.split(found.token_ids)[1])
    stops = options.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
