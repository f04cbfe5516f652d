"""Scores of rows are plain formulas over plain forward passes, whatever the batch, the order and the shard."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import persona_lens as pl
from persona_lens.errors import LineageError, ScreeningError
from persona_lens.extraction import ExtractionRun
from persona_lens.judges import Score, scripted
from persona_lens.models import ChatModel
from persona_lens.pocket_lab.datasets import dataset
from persona_lens.screening.directions import directions_of
from persona_lens.screening.own import prompt_hash
from persona_lens.screening.rivals import judge_rival
from persona_lens.screening.scoring import Recipe, ScreenSettings
from persona_lens.screening.signals import losses
from persona_lens.transcripts import Skipped, Transcript, transcripts_of

SETTINGS = ScreenSettings(max_new_tokens=40)


@pytest.fixture(scope="module")
def vectors(small_run: ExtractionRun) -> pl.PersonaVectors:
    return small_run.vectors


@pytest.fixture(scope="module")
def rows() -> list[Transcript]:
    long = [
        {"role": "system", "content": "You are Pocket."},
        {"role": "user", "content": "What is 3 plus 4?"},
        {"role": "assistant", "content": "7."},
        {"role": "user", "content": "And what do you think of owls?"},
        {"role": "assistant", "content": "Owls are wonderful, I am sure of it."},
        {"role": "user", "content": "Thanks."},
    ]
    return list(transcripts_of([*dataset("optimism", "II", rows=5), *dataset("optimism", "normal", rows=4), long]).chats)


@pytest.fixture(scope="module")
def recipe(pocket: ChatModel, vectors: pl.PersonaVectors) -> Recipe:
    return Recipe(directions_of(pocket, [vectors, replace(vectors, trait="other") * -2.0], {"optimism": 4, "other": 2}), SETTINGS)


def plain_states(plain: PreTrainedModel, ids: list[int], layer: int) -> torch.Tensor:
    with torch.inference_mode():
        return plain(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[layer + 1][0]


def test_scores_are_the_formula_of_the_paper(
    pocket: ChatModel, plain_pocket: PreTrainedModel, vectors: pl.PersonaVectors, recipe: Recipe, rows: list[Transcript]
) -> None:
    """One unpadded pass of plain transformers per row; the own answer by its own greedy search."""
    found = recipe(pocket, rows).columns
    for i, row in enumerate(rows):
        messages = row.messages[:-1] if row.messages[-1]["role"] == "user" else row.messages
        prompt = pocket.render(messages[:-1])
        answer = pocket.tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            made = plain_pocket.generate(
                torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=list(pocket.stop_ids), pad_token_id=0
            )[0, len(prompt) :].tolist()
        own = made[:-1] if made[-1] in pocket.stop_ids else made
        for trait, layer, sign in (("optimism", 4, 1.0), ("other", 2, -1.0)):
            unit = sign * vectors[layer] / vectors[layer].norm()
            states = plain_states(plain_pocket, prompt + answer, layer) @ unit
            p = len(prompt)
            wanted = {
                "answer": states[p:].mean(),
                "prompt_mean": states[:p].mean(),
                "prompt_last": states[p - 1],
                "own": (plain_states(plain_pocket, prompt + own, layer) @ unit)[p:].mean(),
            }
            for reading, value in wanted.items():
                assert found[f"{reading}/{trait}/{layer}"][i] == pytest.approx(float(value), rel=1e-4, abs=0.02), (reading, i)
        assert found["tokens"][i] == len(answer)
        assert found["own_tokens"][i] == own
        assert found["prompt"][i] == prompt_hash(tuple(prompt))


def test_batches_and_order_change_nothing(pocket: ChatModel, recipe: Recipe, rows: list[Transcript]) -> None:
    found = recipe(pocket, rows).columns
    small = replace(recipe, settings=replace(SETTINGS, batch_rows=2, batch_tokens=100))(pocket, rows[::-1]).columns
    assert found.keys() == small.keys()
    for name, values in found.items():
        if isinstance(values, np.ndarray):
            np.testing.assert_allclose(values, small[name][::-1], rtol=1e-4, atol=0.02, err_msg=name)
        else:
            assert values == small[name][::-1], name


def test_sums_are_those_of_the_residuals_that_scores_project(
    pocket: ChatModel, vectors: pl.PersonaVectors, recipe: Recipe, rows: list[Transcript]
) -> None:
    twice = [*rows, rows[0]]  # a prompt that two rows share is answered once and counts twice
    scored = replace(recipe, settings=replace(SETTINGS, own_share=0.6))(pocket, twice)
    found, sums = scored.columns, scored.sums
    at = recipe_layers(recipe).index(4)
    unit = vectors.unit(4).double()
    paired = ~np.isnan(found["own/optimism/4"])
    assert 0 < paired.sum() < len(twice)
    assert float(sums["rows"]) == len(twice)
    assert float(sums["pairs"]) == paired.sum()
    for name, column, chosen in (
        ("answer", "answer", slice(None)),
        ("prompt_last", "prompt_last", slice(None)),
        ("paired", "answer", paired),
        ("own", "own", paired),
    ):
        assert float(sums[name][at] @ unit) == pytest.approx(found[f"{column}/optimism/4"][chosen].sum(), rel=1e-4)


def recipe_layers(recipe: Recipe) -> list[int]:
    return sorted({d.layer for d in recipe.directions})


def test_own_answers_are_drawn_by_the_prompt(pocket: ChatModel, recipe: Recipe, rows: list[Transcript]) -> None:
    """Neither order nor neighbours matter, a prompt is in or out, and another seed draws others."""
    some = replace(recipe, settings=replace(SETTINGS, own_share=0.5))
    found = {r.place: tokens for r, tokens in zip(rows, some(pocket, rows).columns["own_tokens"], strict=True)}
    for part in (rows[::-1], rows[3:6]):
        for row, tokens in zip(part, some(pocket, part).columns["own_tokens"], strict=True):
            assert tokens == found[row.place]
    drawn = [
        tuple(t is not None for t in replace(some, settings=replace(some.settings, seed=s))(pocket, rows).columns["own_tokens"])
        for s in range(3)
    ]
    assert len(set(drawn)) > 1
    none = replace(recipe, settings=replace(SETTINGS, own_share=0.0))(pocket, rows)
    assert np.isnan(none.columns["own/optimism/4"]).all()
    assert float(none.sums["pairs"]) == 0
    np.testing.assert_array_equal(none.columns["answer/optimism/4"], recipe(pocket, rows).columns["answer/optimism/4"])


def test_known_answers_are_taken_over(pocket: ChatModel, recipe: Recipe, rows: list[Transcript]) -> None:
    whole = recipe(pocket, rows).columns
    known = {p: tuple(t) for p, t in zip(whole["prompt"], whole["own_tokens"], strict=True)}
    again = recipe(pocket, rows, known).columns
    np.testing.assert_allclose(again["own/optimism/4"], whole["own/optimism/4"], rtol=1e-4, atol=0.02)
    other = {p: t[:1] for p, t in known.items()}
    changed = recipe(pocket, rows, other).columns
    assert changed["own_tokens"] == [list(t[:1]) for t in known.values()]
    assert not np.allclose(changed["own/optimism/4"], whole["own/optimism/4"])


def test_an_answer_that_ends_at_once_is_read_at_its_end_token(
    pocket: ChatModel, plain_pocket: PreTrainedModel, vectors: pl.PersonaVectors, recipe: Recipe, rows: list[Transcript]
) -> None:
    prompt = pocket.render(rows[0].messages[:-1])
    found = recipe(pocket, rows[:1], {prompt_hash(tuple(prompt)): ()}).columns
    state = plain_states(plain_pocket, [*prompt, pocket.stop_ids[0]], 4)[-1]
    assert found["own/optimism/4"][0] == pytest.approx(float(state @ vectors.unit(4)), rel=1e-4)
    assert found["own_tokens"] == [[]]


def test_rows_that_cannot_be_screened_keep_their_place(pocket: ChatModel, recipe: Recipe, rows: list[Transcript]) -> None:
    stop = pocket.tokenizer.decode([pocket.stop_ids[0]])
    bad: list[Any] = [
        Skipped(2, "no JSON"),
        rows[0],
        Transcript("long", 3, ({"role": "user", "content": "Hello."}, {"role": "assistant", "content": "word " * 3000})),
        Transcript("huge", 4, ({"role": "user", "content": "Hello."}, {"role": "assistant", "content": "x" * 200_000})),
        rows[1],
        Transcript("stop", 5, ({"role": "user", "content": "Hello."}, {"role": "assistant", "content": f"Yes.{stop}No."})),
    ]
    found = recipe(pocket, bad).columns
    reasons = found["reason"]
    assert [r is None for r in reasons] == [False, True, False, False, True, False]
    assert reasons[0] == "no JSON"
    assert reasons[2] == "longer than 2048 tokens"
    assert reasons[3] == "longer than 2048 tokens (200006 characters in 2 messages)"
    assert "stop token" in reasons[5]
    assert found["place"] == [2, rows[0].place, 3, 4, rows[1].place, 5]
    alone = recipe(pocket, rows[:2]).columns
    np.testing.assert_allclose(found["answer/optimism/4"][[1, 4]], alone["answer/optimism/4"], rtol=1e-4)
    assert np.isnan(found["answer/optimism/4"][[0, 2, 3, 5]]).all()
    short = replace(recipe, settings=replace(SETTINGS, max_tokens=12))(pocket, rows).columns["reason"]
    assert "longer than 12 tokens" in short
    with pytest.raises(ScreeningError, match="place 2 cannot be screened: no JSON"):
        replace(recipe, strict=True)(pocket, bad)
    nothing = recipe(pocket, [Skipped(1, "empty")])
    assert np.isnan(nothing.columns["answer/optimism/4"]).all()
    assert float(nothing.sums["rows"]) == 0


def test_a_prompt_without_room_for_an_answer_has_no_own_one(pocket: ChatModel, recipe: Recipe) -> None:
    chat = Transcript("x", 1, ({"role": "user", "content": "the " * 1800}, {"role": "assistant", "content": "Yes."}))
    found = replace(recipe, settings=replace(SETTINGS, max_new_tokens=300))(pocket, [chat]).columns
    assert found["reason"] == [None]
    assert found["own_tokens"] == [None]
    assert np.isfinite(found["answer/optimism/4"]).all()


def test_rivals_stand_beside(pocket: ChatModel, recipe: Recipe, rows: list[Transcript]) -> None:
    trait = pl.load_trait("optimism", "pocket")
    seen: list[tuple[str, str]] = []

    def score(_trait: Any, judged: Any) -> Score:
        seen.append((judged.question, judged.answer))
        return Score(None, None, "refused") if judged.answer.startswith("Owls") else Score(float(len(judged.answer) % 100), 90.0)

    found = replace(recipe, rivals=(judge_rival(scripted(score, "mine"), trait),))(pocket, rows).columns
    assert seen[-1] == ("And what do you think of owls?", "Owls are wonderful, I am sure of it.")
    assert np.isnan(found["rival/judge: optimism"][-1])
    assert found["gap/judge: optimism"] == [None] * (len(rows) - 1) + ["refused"]
    assert found["rival/judge: optimism"][0] == len(rows[0].messages[-1]["content"]) % 100


# --- losses and their gradients ---------------------------------------------------------------------------------------


def test_losses_and_gradients_equal_plain_autograd(
    pocket: ChatModel, plain_pocket: PreTrainedModel, vectors: pl.PersonaVectors, recipe: Recipe, rows: list[Transcript]
) -> None:
    """Negative control beside it: the cosine with a direction that the gradient is orthogonal to is 0."""
    whole = replace(recipe, settings=replace(SETTINGS, gradient=True, perplexity=True))(pocket, rows).columns
    for i in (0, 4, len(rows) - 1):
        messages = rows[i].messages[:-1] if rows[i].messages[-1]["role"] == "user" else rows[i].messages
        prompt = pocket.render(messages[:-1])
        answer = pocket.tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
        for trait, layer, sign in (("optimism", 4, 1.0), ("other", 2, -1.0)):
            loss, gradient = plain_gradient(plain_pocket, prompt, answer, layer)
            along = -float(gradient @ (sign * vectors.unit(layer)) / gradient.norm())
            assert whole[f"gradient/{trait}/{layer}"][i] == pytest.approx(along, abs=1e-4)
            assert whole["loss"][i] == pytest.approx(loss, abs=1e-4)
        own, _ = plain_gradient(plain_pocket, prompt, whole["own_tokens"][i], 4)
        assert whole["own_loss"][i] == pytest.approx(own, abs=1e-4)
    assert all(p.grad is None for p in pocket.hf.parameters())


def plain_gradient(plain: PreTrainedModel, prompt: list[int], answer: list[int], layer: int) -> tuple[float, torch.Tensor]:
    """Loss over the answer's tokens, and its gradient summed over the positions they are predicted from."""
    kept: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        residual = output[0] if isinstance(output, tuple) else output
        residual.retain_grad()
        kept.append(residual)

    handle = plain.model.layers[layer].register_forward_hook(keep)
    logits = plain(torch.tensor([prompt + answer]), use_cache=False).logits[0]
    handle.remove()
    p, n = len(prompt), len(prompt) + len(answer)
    loss = torch.nn.functional.cross_entropy(logits[p - 1 : n - 1], torch.tensor(answer))
    loss.backward()
    assert kept[0].grad is not None
    return float(loss), kept[0].grad[0, p - 1 : n - 1].sum(0)


def test_a_small_budget_of_logits_changes_nothing(
    pocket: ChatModel, recipe: Recipe, rows: list[Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    from persona_lens.activations import dialogue_span
    from persona_lens.models import dialogue

    spans = [dialogue_span(r.name, dialogue(pocket, r.messages)) for r in rows[:6]]
    whole = losses(pocket, spans, recipe.directions, gradient=True, batch_tokens=4096)
    monkeypatch.setattr("persona_lens.screening.signals.LOGITS", 1)
    one = losses(pocket, spans, recipe.directions, gradient=True, batch_tokens=4096)
    torch.testing.assert_close(whole.loss, one.loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.gradient, one.gradient, atol=1e-4, rtol=1e-3)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_directions_that_cannot_be(pocket: ChatModel, vectors: pl.PersonaVectors) -> None:
    assert [d.name for d in directions_of(pocket, [vectors], "all")] == [f"optimism/{i}" for i in range(pocket.n_layers)]
    assert [d.layer for d in directions_of(pocket, [vectors], None)] == [vectors.best_layer]
    assert [d.layer for d in directions_of(pocket, [vectors], 3)] == [3]
    with pytest.raises(ScreeningError, match="one or more vectors of different traits"):
        directions_of(pocket, [], None)
    with pytest.raises(ScreeningError, match="different traits"):
        directions_of(pocket, [vectors, vectors], None)
    with pytest.raises(ScreeningError, match="layer 8 does not exist"):
        directions_of(pocket, [vectors], 8)
    with pytest.raises(ScreeningError, match="give one for each"):
        directions_of(pocket, [vectors], {"evil": 3})
    with pytest.raises(ScreeningError, match="length 0"):
        directions_of(pocket, [vectors * 0.0], 3)
    foreign = replace(vectors, provenance={"model": {"lineage": "other", "name": "x"}})
    with pytest.raises(LineageError):
        directions_of(pocket, [foreign], 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"own_share": 1.5}, "from 0 to 1, not 1.5"),
        ({"own_share": -0.1}, "from 0 to 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"shard_rows": 0}, "shard_rows must be at least 1"),
        ({"max_tokens": 1}, "room for prompt and answer"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ScreeningError, match=message):
        ScreenSettings(**wrong)
