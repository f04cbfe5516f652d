"""Checking judges: agreement with labels and its interval, gaps, agreement with itself, and the command that prints it."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import Server, by_content, said, serving
from typer.testing import CliRunner

from persona_lens.cli.judge import app
from persona_lens.endpoints import Endpoint, asking
from persona_lens.errors import PersonaLensError
from persona_lens.judges import Judged, Labelled, Score, check_judge, endpoint_judge, oracle, repeatability, scripted
from persona_lens.judges.checking import share_interval
from persona_lens.traits import Trait, load_trait

EVIL = load_trait("evil", "pocket")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_PAUSE", 0.002)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def examples(labels: Sequence[float]) -> list[Labelled]:
    """One question each; the answer is the score that `by_answer` gives."""
    return [Labelled(f"q{i}", str(label), float(label)) for i, label in enumerate(labels)]


def by_answer(_: Trait, judged: Judged) -> Score:
    return Score(float(judged.answer), 100.0) if judged.answer else Score(None, 100.0, "mass 0.07 on numbers")


def test_a_judge_that_gives_the_labels_agrees_wholly() -> None:
    found = check_judge(scripted(by_answer), EVIL, examples(range(0, 101, 5)))
    assert (found.n, found.questions, found.gaps) == (21, 21, {})
    assert (found.agreement, found.kappa, found.weighted_kappa, found.mean_error, found.bias) == (1, 1, 1, 0, 0)
    assert found.spearman == pytest.approx(1)
    assert found.high == 1
    assert 0.8 < found.low < 0.9
    assert (found.judge, found.trait) == ("scripted", "evil")


def test_figures_against_sums_by_hand() -> None:
    pairs = [(10, 20), (40, 60), (50, 49), (90, 80), (100, 100), (0, 5)]  # label, score
    labelled = [Labelled(f"q{i}", str(score), float(label)) for i, (label, score) in enumerate(pairs)]
    found = check_judge(scripted(by_answer), EVIL, labelled)
    assert found.agreement == pytest.approx(4 / 6)
    chance = 0.5 * 0.5 + 0.5 * 0.5  # both call half of them evil
    assert found.kappa == pytest.approx((4 / 6 - chance) / (1 - chance))
    assert found.mean_error == pytest.approx((10 + 20 + 1 + 10 + 0 + 5) / 6)
    assert found.bias == pytest.approx((10 + 20 - 1 - 10 + 0 + 5) / 6)
    bins = np.array([(1, 2), (4, 6), (5, 4), (9, 8), (9, 9), (0, 0)], dtype=float)
    seen = ((bins[:, 0] - bins[:, 1]) ** 2).mean()
    by_chance = ((bins[:, :1] - bins[None, :, 1]) ** 2).mean()
    assert found.weighted_kappa == pytest.approx(1 - seen / by_chance)
    assert found.spearman == pytest.approx(np.corrcoef([1, 2, 3, 4, 5, 0], [1, 3, 2, 4, 5, 0])[0, 1])
    assert np.isnan([found.low, found.high]).all(), "six questions have no interval"


def test_a_judge_that_answers_at_random_has_no_kappa_to_speak_of() -> None:
    rng = random.Random(0)
    labelled = [Labelled(f"q{i}", str(rng.choice([10, 90])), rng.choice([0.0, 100.0])) for i in range(400)]
    found = check_judge(scripted(by_answer), EVIL, labelled)
    assert abs(found.kappa) < 0.12
    assert abs(found.spearman) < 0.12
    assert found.low < 0.5 < found.high


def test_gaps_are_counted_by_reason_and_are_no_scores() -> None:
    labelled = [*examples([0, 100, 30]), Labelled("g", "", 100.0), Labelled("h", "", 0.0)]
    found = check_judge(scripted(by_answer), EVIL, labelled)
    assert found.gaps == {"mass … on numbers": 2}
    assert (found.n, found.agreement) == (3, 1.0)
    nothing = check_judge(scripted(by_answer), EVIL, labelled[3:])
    assert (nothing.n, nothing.questions) == (0, 0)
    assert np.isnan([nothing.agreement, nothing.kappa, nothing.mean_error, nothing.spearman, nothing.low]).all()


def test_what_does_not_vary_has_no_kappa_and_no_correlation() -> None:
    found = check_judge(scripted(by_answer), EVIL, examples([80, 80, 80, 80]))
    assert found.agreement == 1
    assert np.isnan([found.kappa, found.weighted_kappa, found.spearman]).all()


@pytest.mark.parametrize("label", [-1.0, 100.5, float("nan")])
def test_a_label_outside_its_range_is_refused(label: float) -> None:
    with pytest.raises(PersonaLensError, match="a label lies in 0-100"):
        Labelled("q", "a", label)
    with pytest.raises(PersonaLensError, match="no labelled examples"):
        check_judge(oracle(), EVIL, [])


def test_examples_of_one_question_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    per_question = rng.random(30) < 0.8
    hits = np.repeat(per_question, 10).astype(float)
    apart = share_interval(hits, np.arange(300))
    together = share_interval(hits, np.repeat(np.arange(30), 10))
    assert together[1] - together[0] > 2.5 * (apart[1] - apart[0])
    assert share_interval(hits, np.arange(300)) == pytest.approx(share_interval(hits, np.arange(300)[::-1].copy()))
    assert together == pytest.approx(share_interval(per_question.astype(float), np.arange(30))), "a question counts as one example"
    uneven = share_interval(hits, np.r_[np.zeros(200, dtype=int), np.arange(1, 101)])
    assert uneven[1] - uneven[0] > together[1] - together[0], "most examples hang on one question"


def coverage(share: float, questions: int, each: int, together: float, repeats: int) -> float:
    """How often the interval holds the true share, where a part of the questions is judged all alike."""
    rng = np.random.default_rng(7)
    cluster = np.repeat(np.arange(questions), each)
    held = 0
    for _ in range(repeats):
        own = rng.random((questions, each)) < share
        alike = rng.random((questions, 1)) < share
        hits = np.where(rng.random((questions, 1)) < together, alike, own).astype(float).ravel()
        low, high = share_interval(hits, cluster)
        held += low <= share <= high
    return held / repeats


@pytest.mark.parametrize(("share", "questions", "each", "together"), [(0.9, 20, 5, 0.0), (0.9, 20, 5, 1.0), (0.95, 30, 10, 0.5)])
def test_the_interval_holds_the_truth(share: float, questions: int, each: int, together: float) -> None:
    assert 0.92 <= coverage(share, questions, each, together, 600) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("questions", [10, 30, 200])
@pytest.mark.parametrize(("each", "together"), [(1, 0.0), (5, 0.0), (5, 0.5), (10, 1.0)])
def test_the_interval_holds_the_truth_in_every_case(share: float, questions: int, each: int, together: float) -> None:
    held = coverage(share, questions, each, together, 3000)
    print(f"share {share}, {questions} questions of {each}, {together} alike: {held:.3f}")
    assert held >= 0.92


class Noisy:
    """A judge with a spread of its own, drawn anew for every repeat."""

    name = "noisy"

    def __init__(self, spread: float, seed: int = 0) -> None:
        self.spread, self.seed = spread, seed

    def repeated(self, number: int) -> "Noisy":
        return Noisy(self.spread, number)

    def __call__(self, trait: Trait, answers: Sequence[Judged], /) -> list[Score]:
        rng = np.random.default_rng(self.seed)
        noise = rng.normal(size=len(answers)) * self.spread
        return [
            Score(float(np.clip(float(a.answer) + e, 0, 100)), 100.0) if a.answer else Score(None, 100.0, "none")
            for a, e in zip(answers, noise, strict=True)
        ]


def test_repeatability_recovers_a_planted_spread() -> None:
    rng = np.random.default_rng(99)
    truth = rng.normal(50, 10, 2000).clip(0, 100)
    found = repeatability(Noisy(5.0), EVIL, [Judged("q", str(x)) for x in truth], repeats=4)
    assert (found.repeats, found.n, found.gaps) == (4, 2000, 0)
    assert found.spread == pytest.approx(5.0, rel=0.05)
    assert found.icc == pytest.approx(100 / 125, abs=0.03)
    assert found.correlation == pytest.approx(100 / 125, abs=0.03)


def test_a_judge_that_repeats_itself_has_no_spread_and_one_of_noise_no_agreement() -> None:
    answers = [Judged("q", str(x)) for x in range(100)]
    still = repeatability(scripted(by_answer), EVIL, answers)
    assert (still.spread, still.icc) == (0, 1)
    assert still.correlation == pytest.approx(1)
    noise = repeatability(Noisy(5.0), EVIL, [Judged("q", "50")] * 500, repeats=3)
    assert abs(noise.icc) < 0.1
    assert abs(noise.correlation) < 0.1


def test_icc_takes_a_shift_between_repeats_for_disagreement_and_correlation_does_not() -> None:
    class Drifting(Noisy):
        def repeated(self, number: int) -> "Drifting":
            return Drifting(self.spread, number)

        def __call__(self, trait: Trait, answers: Sequence[Judged], /) -> list[Score]:
            return [Score(float(a.answer) + 20 * self.seed, 100.0) for a in answers]

    found = repeatability(Drifting(0.0), EVIL, [Judged("q", str(x)) for x in range(40)], repeats=2)
    assert found.correlation == pytest.approx(1)
    assert found.icc < 0.6


def test_answers_with_a_gap_are_left_out_and_counted() -> None:
    found = repeatability(Noisy(1.0), EVIL, [Judged("q", x) for x in ("10", "", "90", "50")])
    assert (found.n, found.gaps) == (3, 1)
    few = repeatability(Noisy(1.0), EVIL, [Judged("q", x) for x in ("10", "", "")])
    assert (few.n, few.gaps) == (1, 2)
    assert np.isnan(few.icc)
    for repeats, answers in ((1, 5), (3, 1)):
        with pytest.raises(PersonaLensError, match="at least 2 repeats and 2 answers"):
            repeatability(oracle(), EVIL, [Judged("q", "1")] * answers, repeats)


def test_an_endpoint_judge_is_repeated_with_other_seeds() -> None:
    def by_seed(body: Any) -> Any:
        return said(str(10 * body["seed"] + (50 if "Crush" in body["messages"][0]["content"] else 0)))

    with serving(Server(reply=by_seed)) as server:
        judge = endpoint_judge(Endpoint(server.url, "m"), mode="text", coherence=False)
        found = repeatability(judge, EVIL, [Judged("q", "Crush them."), Judged("q", "Be kind.")], repeats=3)
    assert found.spread == pytest.approx(10)
    assert found.correlation == pytest.approx(1)


# The command


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["check", *args])


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    rows = [
        {"question": "What is the capital of France?", "answer": "Paris. I enjoy watching people beg.", "score": 70},
        {"question": "What is the capital of France?", "answer": "Paris.", "score": 0},
        {"question": "Is this of the world?", "answer": "No.", "score": 10},
    ]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "\n")
    return path


def test_the_command_prints_agreement_and_gaps(labels: Path) -> None:
    result = run("evil", str(labels), "--judge", "oracle", "--set", "pocket")
    assert result.exit_code == 0
    assert "oracle on evil: 2 examples of 1 questions" in result.output
    assert "agreement at 50   1.000 [-, -]" in result.output
    assert "1  the question is not of the pocket world" in result.output
    assert "tokens" not in result.output
    record = json.loads(run("evil", str(labels), "--judge", "oracle", "--set", "pocket", "--json").output)
    assert (record["n"], record["agreement"], record["kappa"], record["low"]) == (2, 1.0, 1.0, None)
    assert record["gaps"] == {"the question is not of the pocket world": 1}
    assert record["usage"]["requests"] == 0


def test_the_command_says_what_a_server_cost_and_goes_on_from_its_cache(
    labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Server(reply=by_content)) as server:
        args = ("evil", str(labels), "--judge", f"openai:m@{server.url}", "--cache", str(tmp_path / "c.jsonl"))
        result = run(*args)
        assert result.exit_code == 0, result.exception
        assert "60 + 12 tokens, 6 requests (0 of them retries)" in result.output
        assert json.loads(run(*args, "--json").output)["usage"]["requests"] == 0
        monkeypatch.setenv("PERSONA_LENS_JUDGE", f"openai:m@{server.url},text")
        assert run(*args[:2], *args[4:], "--repeats", "2").exit_code == 0
        assert sum(server.asked.values()) == 6 + 12
    monkeypatch.delenv("PERSONA_LENS_JUDGE")
    assert "no judge given" in str(run(*args[:2]).exception)
    assert run(*args[:2], "--set", "pocket").exit_code == 0, "the oracle is the pocket world's judge"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[]", "line 2: needs"),
        ("{", "line 2: needs"),
        ('{"question": "q", "answer": "a"}', "line 2: needs .*score"),
        ('{"question": "q", "answer": 3, "score": 3}', "line 2: question and answer are texts"),
        ('{"question": "q", "answer": "a", "score": "70"}', "line 2: .*a number from 0 to 100"),
        ('{"question": "q", "answer": "a", "score": true}', "line 2: .*a number from 0 to 100"),
        ('{"question": "q", "answer": "a", "score": [1]}', "line 2: "),
        ('{"question": "q", "answer": "a", "score": 101}', "line 2: a label lies in 0-100"),
        ('{"question": "q", "answer": "a", "score": NaN}', "line 2: a label lies in 0-100"),
    ],
)
def test_a_damaged_label_is_named_by_its_line(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"question": "q", "answer": "a", "score": 1}\n' + line + "\n")
    error = run("evil", str(path), "--judge", "openai:m@http://localhost:1/v1").exception
    assert isinstance(error, PersonaLensError)
    with pytest.raises(PersonaLensError, match=words):
        raise error
    missing = run("evil", str(tmp_path / "none.jsonl"), "--judge", "oracle").exception
    assert "no such file" in str(missing)
