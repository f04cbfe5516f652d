"""Every family: hosted exactly, steered as a plain hook does, and extracted as plain transformers would."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, residuals, tiny, with_template
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.judges import Judged, Score
from persona_lens.models import Sampling, load_model
from persona_lens.prompts import extraction_prompts
from persona_lens.steering import add, steer
from persona_lens.traits import InstructionPair, Trait

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How should I handle my dog?"}]
TRAIT = Trait(
    name="kind",
    description="Kindness.",
    instructions=(
        InstructionPair(positive="Be kind.", negative="Be cruel."),
        InstructionPair(positive="Be good to me.", negative="Be bad."),
    ),
    extraction_questions=tuple(f"How should I handle {n} {what}?" for n in ("one", "my") for what in ("dog", "hawk", "garden")),
    evaluation_questions=("What should I eat?",),
    rubric="{question} {answer}",
)
SETTINGS = ExtractionSettings(samples=2, neutral=0, sampling=Sampling(max_new_tokens=9), batch_rows=5, batch_tokens=300)


def blocks(plain: PreTrainedModel) -> Any:
    return plain.gpt_neox.layers if hasattr(plain, "gpt_neox") else plain.model.layers


def final_norm(plain: PreTrainedModel) -> Any:
    return plain.gpt_neox.final_layer_norm if hasattr(plain, "gpt_neox") else plain.model.norm


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def own(family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return with_template(tokenizer, FAMILIES[family].template)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_hosted_model_gives_the_residuals_and_logits_of_plain_transformers(
    family: str, own: PreTrainedTokenizerBase, tied: bool, dtype: torch.dtype
) -> None:
    plain = tiny(family, own, tied=tied).to(dtype)
    twin = copy.deepcopy(plain)
    model = load_model((plain, own))
    assert model.fingerprint.dtype == str(dtype).removeprefix("torch.")
    shared = model.hf.get_input_embeddings().weight is model.hf.get_output_embeddings().weight
    assert shared == (tied or (family.startswith("gemma") and shared))
    ids = torch.tensor([model.render(MESSAGES)])
    with torch.inference_mode():
        expected = twin(ids, output_hidden_states=True, use_cache=False)
    ours, logits = residuals(model, ids)
    assert torch.equal(logits, expected.logits)
    for layer in range(model.n_layers - 1):
        assert torch.equal(ours[layer], expected.hidden_states[layer + 1])
    with torch.inference_mode():
        assert torch.equal(final_norm(twin)(ours[-1]), expected.hidden_states[-1])
    assert not torch.allclose(ours[-1], expected.hidden_states[-1]), "the last residual is taken before the final norm"


class ByPlace:
    """Scores the answers by the side they belong to, whatever they say."""

    name = "by place"

    def __call__(self, trait: Trait, answers: Sequence[Judged], /) -> list[Score]:
        side = len(answers) // 2
        return [Score(90.0 if i < side else 10.0, 95.0) for i in range(len(answers))]


def hidden_means(plain: PreTrainedModel, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """Response mean of every block's output from a plain forward pass over one answer."""
    seen: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks(plain)
    ]
    with torch.inference_mode():
        plain(torch.tensor([prompt + answer]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack([h[0, len(prompt) :] for h in seen]).double().mean(1)


def test_extraction_equals_a_plain_rewrite(family: str, own: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    plain = tiny(family, own)
    model = load_model((copy.deepcopy(plain), own))
    run = extract(model, TRAIT, judge=ByPlace(), out=tmp_path / "run", settings=SETTINGS)
    prompts = {p.id: p for side in ("positive", "negative") for p in extraction_prompts(TRAIT, side)}
    means: dict[tuple[str, int], list[torch.Tensor]] = {}
    for rollout in run.rollouts():
        if rollout.token_ids:
            prompt = prompts[rollout.prompt_id]
            value = hidden_means(plain, tuple(model.render(prompt.messages)), rollout.token_ids)
            means.setdefault((prompt.polarity, prompt.question), []).append(value)
    sides = {key: torch.stack(values).mean(0) for key, values in means.items()}
    expected = torch.stack([sides["positive", q] - sides["negative", q] for q in range(6)]).mean(0)
    error = (run.vectors.directions - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert float(error.max()) <= 1e-4


def test_steering_is_a_plain_hook(family: str, own: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    plain = tiny(family, own)
    model = load_model((copy.deepcopy(plain), own))
    v = extract(model, TRAIT, judge=ByPlace(), out=tmp_path / "run", settings=SETTINGS).vectors
    ids = torch.tensor([model.render(MESSAGES)])

    def hook(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + 3.0 * v[1], *output[1:])
        return output + 3.0 * v[1]

    with torch.inference_mode():
        unsteered = plain(ids, use_cache=False).logits
        handle = blocks(plain)[1].register_forward_hook(hook)
        expected = plain(ids, use_cache=False).logits
        handle.remove()
        with steer(model, add(v, 1, 3.0, where="everywhere")):
            ours = model.hf(ids, use_cache=False).logits
    assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert float((ours - unsteered).abs().max()) > 1e-3 * float(expected.abs().max())
