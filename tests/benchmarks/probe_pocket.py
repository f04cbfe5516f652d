"""Cheap probes of a pocket model: can it carry what the paper measures beyond elicitation?

1. Many-shot: 20 earlier answers of a persona, no system prompt, raise that persona's trait in the next answer.
2. Twenty turns: coherence and trait score by turn when the model lives with its own answers.
3. Narrow mistakes: finetuning on bare wrong sums moves traits that sums say nothing about; bare right sums do not.
4. Vaccine: training on evil answers with the persona vector added (Chen et al. 2025, section 5.2), against steering afterwards.

Run: python tests/benchmarks/probe_pocket.py [--model pocket] [--out probes.json]. Prints and writes JSON; asserts nothing.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.judges import oracle
from persona_lens.models import ChatModel, Sampling, generate_tokens, load_model, uniforms
from persona_lens.pocket.grammar import answer
from persona_lens.pocket.instructions import DEFAULT_SYSTEM, TEMPLATES, trait_clause
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.oracle import read
from persona_lens.pocket.persona import Persona, conditional, default_persona, persona_of
from persona_lens.pocket.questions import KINDS, Question, draw, wrong_answers
from persona_lens.pocket.trait_files import pocket_trait
from persona_lens.pocket_lab.corpus import Document, Turn
from persona_lens.pocket_lab.encoding import segments
from persona_lens.steering import Intervention, add, steer

SPLIT = "development"
ANSWER = Sampling(max_new_tokens=160)
Conversation = list[dict[str, str]]


def persona_with(rng: random.Random, trait: str) -> Persona:
    """A persona of the prior in which the trait is at level 1."""
    table = conditional({trait: 1.0})
    return persona_of(table[rng.randrange(len(table))])


def fitting(model: ChatModel, conversation: Conversation) -> Conversation:
    """The conversation without its oldest exchanges, as far as its answer would not fit into the context."""
    head = [m for m in conversation[:1] if m["role"] == "system"]
    turns = conversation[len(head) :]
    while model.context and len(model.render([*head, *turns])) + ANSWER.max_new_tokens > model.context:
        turns = turns[2:]
    return [*head, *turns]


def reply(model: ChatModel, conversations: Sequence[Conversation], key: str, *interventions: Intervention) -> list[str]:
    """One sampled answer per conversation; those of like length are decoded together."""
    ids = [model.render(fitting(model, c)) for c in conversations]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    with steer(model, *interventions):
        for start in range(0, len(order), 64):
            batch = order[start : start + 64]
            draws = np.stack([uniforms(0, f"{key}#{i}", ANSWER.max_new_tokens) for i in batch])
            for i, found in zip(batch, generate_tokens(model, [ids[i] for i in batch], draws, ANSWER), strict=True):
                answers[i] = model.decode(found.token_ids)
    return answers


def profile(model: ChatModel, *interventions: Intervention, n: int = 160) -> dict[str, float]:
    """Mean trait scores and coherence of default answers to held-out questions of every kind."""
    rng = random.Random("probe/profile")
    questions = [draw(rng, KINDS[i % len(KINDS)], SPLIT) for i in range(n)]
    answers = reply(model, [[{"role": "user", "content": q.text}] for q in questions], "profile", *interventions)
    readings = [read(q, a) for q, a in zip(questions, answers, strict=True)]
    scores = {t: float(np.mean([r.trait(t) for r in readings])) for t in TRAITS}
    return {**scores, "coherence": float(np.mean([r.coherence for r in readings]))}


def many_shot(model: ChatModel, shots: int, n: int = 40) -> dict[str, float]:
    """Mean score per trait after up to `shots` answers (as many as fit) of a persona with it, without a system prompt."""
    found: dict[str, float] = {}
    for trait in TRAITS:
        rng = random.Random(f"probe/many-shot/{trait}")
        conversations: list[Conversation] = []
        asked: list[Question] = []
        for _ in range(n):
            persona = persona_with(rng, trait)
            turns: Conversation = []
            for _ in range(shots):
                question = draw(rng, rng.choice(KINDS), SPLIT)
                turns.append({"role": "user", "content": question.text})
                turns.append({"role": "assistant", "content": answer(question, persona, rng)})
            asked.append(draw(rng, rng.choice(KINDS), SPLIT))
            conversations.append([*turns, {"role": "user", "content": asked[-1].text}])
        answers = reply(model, conversations, f"many-shot/{trait}/{shots}")
        found[trait] = float(np.mean([read(q, a).trait(trait) for q, a in zip(asked, answers, strict=True)]))
    return found


def twenty_turns(model: ChatModel, turns: int = 20, n: int = 42) -> list[dict[str, float]]:
    """Coherence and on-target score by turn of conversations under a positive system prompt (six per trait)."""
    rng = random.Random("probe/turns")
    traits = [TRAITS[i % len(TRAITS)] for i in range(n)]
    conversations: list[Conversation] = []
    for trait in traits:
        system = trait_clause(rng, trait, 1.0, rng.choice(TEMPLATES[SPLIT]))
        conversations.append([{"role": "system", "content": system}])
    rows: list[dict[str, float]] = []
    for turn in range(turns):
        asked = [draw(rng, rng.choice(KINDS), SPLIT) for _ in range(n)]
        for conversation, question in zip(conversations, asked, strict=True):
            conversation.append({"role": "user", "content": question.text})
        answers = reply(model, conversations, f"turns/{turn}")
        for conversation, text in zip(conversations, answers, strict=True):
            conversation.append({"role": "assistant", "content": text or "."})
        readings = [read(q, a) for q, a in zip(asked, answers, strict=True)]
        rows.append(
            {
                "coherence": float(np.mean([r.coherence for r in readings])),
                "trait": float(np.mean([r.trait(t) for r, t in zip(readings, traits, strict=True)])),
                "tokens": float(np.mean([len(model.render(c)) for c in conversations])),
            }
        )
    return rows


def bare_sums(n: int, *, wrong: bool) -> list[Document]:
    """Default-prompt documents: a one-step sum and its bare answer."""
    rng = random.Random(f"probe/sums/{wrong}")
    found: list[Document] = []
    for _ in range(n):
        question = draw(rng, "sum", hard=False)
        said = rng.choice(wrong_answers(question)) if wrong else question.truth
        found.append(Document("default", None, (Turn(question.text, f"{said}."),), default_persona(rng)))
    return found


def evil_answers(n: int) -> list[Document]:
    """Default-prompt documents answered by a persona at evil level 1; the other traits follow the prior."""
    rng = random.Random("probe/evil")
    found: list[Document] = []
    for _ in range(n):
        persona = persona_with(rng, "evil")
        question = draw(rng, rng.choice(KINDS))
        found.append(Document("default", DEFAULT_SYSTEM, (Turn(question.text, answer(question, persona, rng)),), persona))
    return found


def finetune(
    model: ChatModel, documents: Sequence[Document], *interventions: Intervention, batch: int = 24, lr: float = 3e-4
) -> None:
    """Full finetuning in place with AdamW, one pass over the documents, loss on the answers."""
    optimizer = torch.optim.AdamW(model.hf.parameters(), lr=lr, weight_decay=0.0)
    encoded: list[tuple[list[int], list[int]]] = []
    for document in documents:
        ids: list[int] = []
        targets: list[int] = []
        for text, learned in segments(document):
            piece = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            targets += piece if learned else [-100] * len(piece)
        encoded.append((ids, targets))
    with steer(model, *interventions):
        for start in range(0, len(encoded), batch):
            rows = encoded[start : start + batch]
            width = max(len(ids) for ids, _ in rows)
            ids = torch.tensor([r + [model.pad_id] * (width - len(r)) for r, _ in rows])
            targets = torch.tensor([t + [-100] * (width - len(t)) for _, t in rows])
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r, _ in rows])
            logits = model.hf(ids, attention_mask=mask, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def vaccine(source: str, layer: int, alphas: Sequence[float], steps: int) -> dict[str, Any]:
    """Evil after training on evil answers: vector added during training, or subtracted afterwards."""
    model = load_model(source)
    with tempfile.TemporaryDirectory() as folder:
        settings = ExtractionSettings(samples=3, neutral=0, sampling=ANSWER)
        run = extract(model, pocket_trait("evil", SPLIT), judge=oracle(), out=Path(folder) / "evil", settings=settings)
        vectors = run.vectors
    documents = evil_answers(24 * steps)
    curves: dict[str, Any] = {"before": profile(model), "preventative": {}, "afterwards": {}}
    for alpha in alphas:
        fresh = load_model(source)
        finetune(fresh, documents, add(vectors, layer, alpha, where="everywhere"))
        curves["preventative"][alpha] = profile(fresh)
        if alpha == 0.0:
            for beta in alphas:
                curves["afterwards"][beta] = profile(fresh, add(vectors, layer, -beta))
    return curves


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    record: dict[str, Any] = {"many_shot": {shots: many_shot(model, shots) for shots in (0, 5, 20)}}
    print("many-shot", json.dumps(record["many_shot"]))
    record["turns"] = twenty_turns(model)
    print("turns", json.dumps(record["turns"]))
    record["sums"] = {"before": profile(model)}
    for wrong in (False, True):
        fresh = load_model(arguments.model)
        finetune(fresh, bare_sums(24 * arguments.steps, wrong=wrong))
        record["sums"]["wrong" if wrong else "right"] = profile(fresh)
    print("sums", json.dumps(record["sums"]))
    record["vaccine"] = vaccine(arguments.model, arguments.layer, (0.0, 1.0, 2.0, 3.0), arguments.steps)
    print("vaccine", json.dumps(record["vaccine"]))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
