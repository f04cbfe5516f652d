"""Rivals by text alone: a judge's scores, and a classifier that has seen the very answers a vector comes from."""

import json
import math
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from persona_lens.errors import PersonaLensError, RunFolderError, ScreeningError
from persona_lens.extraction import ExtractionRun
from persona_lens.judges import Judge, Judged, Score, oracle, scripted
from persona_lens.screening.rivals import Rival, TextClassifier, classifier_of, judge_rival, rated, text_classifier
from persona_lens.traits import Trait, load_trait

WORDS = [f"w{i}" for i in range(60)]
QUESTIONS = [f"q{i:02d}" for i in range(20)]


@pytest.fixture(scope="module")
def optimism() -> Trait:
    return load_trait("optimism", "pocket")


@pytest.fixture(scope="module")
def answers(small_run: ExtractionRun, optimism: Trait) -> list[Judged]:
    """Every answer of the run with its question, and a question from outside."""
    asked = [optimism.extraction_questions[int(r.prompt_id.split("/x")[1])] for r in small_run.rollouts()]
    found = [Judged(q, r.text) for q, r in zip(asked, small_run.rollouts(), strict=True)]
    return [*found, Judged("Who wrote Faust?", "Goethe did.")]


def drawn(seed: int, n: int = 60, planted: str = "", first: int = 0) -> list[str]:
    """Texts of random words, some with a planted one."""
    rng = Random(seed)
    return [" ".join([*rng.choices(WORDS, k=12), *([planted] if planted and i >= first else [])]) for i in range(n)]


def planted(first: int = 0) -> TextClassifier:
    return text_classifier(drawn(1, planted="sunny", first=first), drawn(2), "text: sun")


def asked_of(n: int, seed: int = 0) -> list[str]:
    return Random(seed).choices(QUESTIONS, k=n)


def same(one: tuple[np.ndarray, list[str | None]], other: tuple[np.ndarray, list[str | None]]) -> bool:
    """Bit for bit."""
    return one[0].tobytes() == other[0].tobytes() and one[1] == other[1]


# every rival

MAKERS: dict[str, Callable[[ExtractionRun, Trait], Rival]] = {
    "judge": lambda run, trait: judge_rival(oracle(), trait),
    "classifier": lambda run, trait: classifier_of(run),
    "texts": lambda run, trait: text_classifier(drawn(1), drawn(2), "text: nothing"),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=list(MAKERS))
class TestEveryRival:
    @pytest.fixture
    def rival(self, maker: Callable[[ExtractionRun, Trait], Rival], small_run: ExtractionRun, optimism: Trait) -> Rival:
        return maker(small_run, optimism)

    def test_is_one(self, rival: Rival, answers: list[Judged]) -> None:
        assert isinstance(rival, Rival)
        scores, reasons = rated(rival, answers)
        assert scores.dtype == np.float64
        assert [r is None for r in reasons] == np.isfinite(scores).tolist()

    def test_survives_pickling(self, rival: Rival, answers: list[Judged]) -> None:
        again = pickle.loads(pickle.dumps(rival))
        assert (again.name, again.identity) == (rival.name, rival.identity)
        assert same(again(answers), rival(answers))

    def test_does_not_see_the_other_answers(self, rival: Rival, answers: list[Judged]) -> None:
        scores, reasons = rival(answers)
        order = np.random.default_rng(0).permutation(len(answers))
        assert same(rival([answers[i] for i in order]), (scores[order], [reasons[i] for i in order]))
        for size in (1, 7):
            parts = [rival(answers[i : i + size]) for i in range(0, len(answers), size)]
            assert same((np.concatenate([s for s, _ in parts]), [r for _, rs in parts for r in rs]), (scores, reasons))

    def test_of_nothing_gives_nothing(self, rival: Rival, answers: list[Judged]) -> None:
        scores, reasons = rated(rival, [])
        assert (scores.shape, scores.dtype, reasons) == ((0,), np.float64, [])

    def test_is_made_the_same_again(
        self,
        rival: Rival,
        maker: Callable[[ExtractionRun, Trait], Rival],
        small_run: ExtractionRun,
        optimism: Trait,
        answers: list[Judged],
    ) -> None:
        again = maker(small_run, optimism)
        assert (again.name, again.identity) == (rival.name, rival.identity)
        assert same(again(answers), rival(answers))


# the judge


def test_a_judge_gives_its_trait_scores(small_run: ExtractionRun, optimism: Trait, answers: list[Judged]) -> None:
    scores, reasons = judge_rival(oracle(), optimism)(answers)
    assert scores[:-1].tolist() == [s.trait for s in small_run.scores()]
    assert set(reasons[:-1]) == {None}
    assert math.isnan(scores[-1])
    assert reasons[-1] == "the question is not of the pocket world"


def test_what_a_judge_does_not_score_is_no_zero(optimism: Trait) -> None:
    given = [Score(None, 70.0, "declined"), Score(0.0, 70.0), Score(30.0, None, "no coherence"), Score(None, None, "no answer")]
    judge = scripted(lambda trait, answer: given[int(answer.answer)])
    scores, reasons = rated(judge_rival(judge, optimism), [Judged("q", str(i)) for i in range(4)])
    np.testing.assert_array_equal(scores, [np.nan, 0.0, 30.0, np.nan])
    assert reasons == ["declined", None, None, "no answer"]


def test_a_judge_is_asked_about_its_trait(optimism: Trait) -> None:
    seen: list[tuple[str, Judged]] = []

    def score(trait: Trait, answer: Judged) -> Score:
        seen.append((trait.name, answer))
        return Score(1.0, 1.0)

    judge_rival(scripted(score), optimism)([Judged("q", "a")])
    assert seen == [("optimism", Judged("q", "a"))]


def test_a_judge_is_known_by_its_name_and_all_of_the_trait(optimism: Trait) -> None:
    one = judge_rival(oracle(), optimism)
    assert one.name == "judge: optimism"
    others: list[tuple[Judge, Trait]] = [
        (scripted(lambda trait, answer: Score(0.0, 0.0)), optimism),
        (oracle(), load_trait("evil", "pocket")),
        (oracle(), optimism.model_copy(update={"rubric": optimism.rubric + " Be strict."})),
    ]
    assert len({one.identity, *(judge_rival(*other).identity for other in others)}) == 4


def test_a_judge_that_gives_another_number_of_scores(optimism: Trait) -> None:
    @dataclass(frozen=True)
    class Short:
        name: str = "short"

        def __call__(self, trait: Trait, answers: Sequence[Judged], /) -> list[Score]:
            return [Score(1.0, 1.0)]

    with pytest.raises(PersonaLensError, match="judge 'short' returned 1 scores for 2 answers"):
        judge_rival(Short(), optimism)([Judged("q", "a")] * 2)


# the classifier of texts


def test_scores_are_the_log_odds_of_a_plain_classifier() -> None:
    positive, negative = drawn(1, planted="sunny", first=20), drawn(2, n=90)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    plain = make_pipeline(words, LogisticRegression(max_iter=1000, tol=1e-10))
    plain.fit([*positive, *negative], [1] * 60 + [0] * 90)
    unseen = [*drawn(3, n=20), *drawn(4, n=20, planted="sunny"), "sunny", "w1 w1 w1 w2"]
    scores, _ = text_classifier(positive, negative, "t")([Judged("q", t) for t in unseen])
    np.testing.assert_allclose(scores, plain.decision_function(unseen), atol=1e-5)
    assert np.abs(scores).max() > 0.5


def test_a_planted_word_is_found() -> None:
    found = text_classifier(drawn(1, n=300, planted="sunny"), drawn(2, n=200), "t")
    assert found.auc > 0.9
    assert found.texts == (300, 200)
    scores, _ = found([Judged("q", t) for t in [*drawn(3, planted="sunny"), *drawn(4)]])
    assert roc_auc_score([1] * 60 + [0] * 60, scores) > 0.95
    assert 0.6 < planted(first=30).auc < 0.9


def test_the_question_is_not_read() -> None:
    found = planted()
    assert same(found([Judged("sunny", "w1 w2")]), found([Judged("w3", "w1 w2")]))


def test_what_is_planted_on_the_other_side_counts_against() -> None:
    positive, negative = drawn(1, planted="sunny"), drawn(2)
    unseen = [Judged("q", t) for t in drawn(3, n=10)]
    one, other = text_classifier(positive, negative, "t"), text_classifier(negative, positive, "t")
    np.testing.assert_allclose(one(unseen)[0], -other(unseen)[0], atol=1e-5)
    assert one.identity != other.identity


@pytest.mark.parametrize(("sizes", "questions"), [((30, 30), True), ((15, 60), True), ((15, 60), False)])
def test_labels_without_relation_give_an_auc_of_one_half(sizes: tuple[int, int], questions: bool) -> None:
    """Also for unlike numbers on the sides, where predictions of different folds have unlike zeros."""
    found = []
    for seed in range(60):
        n = sum(sizes)
        asked, texts = asked_of(n, seed), drawn(seed, n)
        texts = [f"{t} {q} {q}" for t, q in zip(texts, asked, strict=True)]
        cut = sizes[0]
        given = (asked[:cut], asked[cut:]) if questions else None
        found.append(text_classifier(texts[:cut], texts[cut:], "t", questions=given).auc)
    assert abs(np.mean(found) - 0.5) < 0.04
    assert np.std(found) > 0.02


def test_what_only_the_questions_tell_is_no_skill() -> None:
    """Sides that differ by their questions: known questions give the side away, questions that were left out do not."""
    rng = Random(0)
    by_question, by_text = [], []
    for _ in range(20):
        mostly = dict(zip(QUESTIONS, rng.sample([0.1, 0.9] * 10, 20), strict=True))
        sides: tuple[list[tuple[str, str]], ...] = ([], [])
        for q in asked_of(200, rng.randrange(10**6)):
            sides[rng.random() < mostly[q]].append((q, f"{q} {q} " + " ".join(rng.choices(WORDS, k=5))))
        (one, other) = ([t for _, t in side] for side in sides)
        questions = ([q for q, _ in sides[0]], [q for q, _ in sides[1]])
        by_question.append(text_classifier(one, other, "t", questions=questions).auc)
        by_text.append(text_classifier(one, other, "t").auc)
    assert np.mean(by_text) > 0.8
    assert abs(np.mean(by_question) - 0.5) < 0.06


def test_equal_texts_are_left_out_together() -> None:
    """Every text stands there many times, with sides that have no relation to it: remembered sides are no skill."""
    rng, found = Random(0), []
    for _ in range(30):
        sides = [drawn(rng.randrange(10**6), n=10) * 6 for _ in range(2)]
        found.append(text_classifier(*sides, "t").auc)
    assert abs(np.mean(found) - 0.5) < 0.1


def test_the_auc_counts_pairs_within_groups_of_questions() -> None:
    """With five questions every question is left out in its turn."""
    positive, negative = drawn(1, n=50, planted="sunny", first=20), drawn(2, n=40)
    asked = asked_of(50, 1), asked_of(40, 2)
    asked = tuple([f"q{int(q[1:]) % 5}" for q in side] for side in asked)
    rows = [*zip(asked[0], positive, [1] * 50, strict=True), *zip(asked[1], negative, [0] * 40, strict=True)]
    right = pairs = 0.0
    for question in sorted(set(asked[0])):
        train, held = [r for r in rows if r[0] != question], [r for r in rows if r[0] == question]
        rest = [[t for _, t, s in train if s == side] for side in (1, 0)]
        scores = text_classifier(*rest, "t")([Judged("q", t) for _, t, _ in held])[0]
        n = math.prod(sum(s == side for _, _, s in held) for side in (0, 1))
        right += n * float(roc_auc_score([s for _, _, s in held], scores))
        pairs += n
    found = text_classifier(positive, negative, "t", questions=asked)
    assert found.auc == pytest.approx(right / pairs, abs=1e-9)
    assert 0.6 < found.auc < 0.95


def test_ties_count_half() -> None:
    same_words = ["one two"] * 20
    asked = [f"q{i % 10}" for i in range(20)]
    assert text_classifier(same_words, same_words, "t", questions=(asked, asked)).auc == 0.5


def test_no_auc_where_no_group_of_questions_has_both_sides() -> None:
    found = text_classifier(drawn(1), drawn(2), "t", questions=(["a"] * 60, ["b"] * 60))
    assert math.isnan(found.auc)
    assert np.isfinite(found([Judged("q", "w1")])[0]).all()


def test_texts_that_are_not_scored_are_no_part_of_the_auc() -> None:
    """Every question has an answer in words of its own, which nobody knows when it is left out."""
    asked = [f"q{i}" for i in range(20)]
    positive = [f"sunny {w}" if i % 2 else f"alone{i}" for i, w in enumerate(WORDS[:20])]
    negative = [f"rainy {w}" for w in WORDS[20:40]]
    assert text_classifier(positive, negative, "t", questions=(asked, asked)).auc == 1.0


def test_an_answer_without_a_known_word_has_no_score() -> None:
    scores, reasons = rated(planted(), [Judged("sunny", t) for t in ("", "?!", "other words only", "w1", "SUNNY!")])
    assert np.isnan(scores).tolist() == [True, True, True, False, False]
    assert reasons == ["no word of it is among the classifier's"] * 3 + [None] * 2
    assert scores[4] > scores[3]


def test_the_order_of_the_texts_does_not_matter() -> None:
    positive, negative, asked = drawn(1, planted="sunny", first=30), drawn(2, n=50), (asked_of(60, 1), asked_of(50, 2))
    one = text_classifier(positive, negative, "t", questions=asked)
    p, n = Random(0).sample(range(60), 60), Random(0).sample(range(50), 50)
    shuffled = [positive[i] for i in p], [negative[i] for i in n]
    other = text_classifier(*shuffled, "t", questions=([asked[0][i] for i in p], [asked[1][i] for i in n]))
    unseen = [Judged("q", t) for t in drawn(3)]
    assert (other.identity, other.auc) == (one.identity, one.auc)
    assert same(other(unseen), one(unseen))


def test_a_classifier_is_known_by_its_texts() -> None:
    positive, negative = drawn(1), drawn(2)
    one = text_classifier(positive, negative, "t")
    assert text_classifier(positive, negative, "another name").identity == one.identity
    assert text_classifier(positive, negative, "t", questions=(asked_of(60), asked_of(60))).identity == one.identity
    others = [
        ([*positive[1:], positive[0] + "!"], negative),
        ([*positive, positive[0]], negative),
        (positive, negative[1:]),
        ([*positive, negative[0]], negative[1:]),
    ]
    assert len({one.identity, *(text_classifier(*other, "t").identity for other in others)}) == 5


# the classifier of an extraction


def kept_texts(run: ExtractionRun, threshold: float = 50.0) -> tuple[list[str], list[str]]:
    """By the rule, not by the library's filter: texts of the kept answers to questions with both sides."""
    found: dict[tuple[str, str], list[str]] = {}
    for rollout, score in zip(run.rollouts(), run.scores(), strict=True):
        _, polarity, _, question = rollout.prompt_id.split("/")
        if score.trait is None or score.coherence is None or score.coherence < 50 or not rollout.token_ids:
            continue
        if polarity != "neutral" and (score.trait >= threshold) == (polarity == "positive"):
            found.setdefault((polarity, question), []).append(rollout.text)
    sides = ("positive", "negative")
    both = {q for _, q in found if all((side, q) in found for side in sides)}
    positive, negative = ([t for (p, q), texts in found.items() if p == side and q in both for t in texts] for side in sides)
    return positive, negative


@dataclass(frozen=True)
class Copy:
    """A run's folder, to be changed."""

    run: ExtractionRun

    def change(self, file: str, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> "Copy":
        """The records as a function makes them; it gives None for those that are left out."""
        path = self.run.path / file
        records = [change(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(json.dumps(r) + "\n" for r in records if r is not None), encoding="utf-8")
        return self


@pytest.fixture
def copy(small_run: ExtractionRun, tmp_path: Path) -> Copy:
    shutil.copytree(small_run.path, tmp_path / "copy")
    return Copy(ExtractionRun(tmp_path / "copy"))


def test_it_learns_from_the_answers_that_the_vector_comes_from(small_run: ExtractionRun) -> None:
    found = classifier_of(small_run)
    counts = small_run.means["independent.counts"].sum(1)
    both = (counts > 0).all(0)
    assert found.name == "text: optimism"
    assert found.texts == tuple(counts[:, both].sum(1).tolist())
    assert found.identity == text_classifier(*kept_texts(small_run), "t").identity


def test_it_tells_optimistic_answers(small_run: ExtractionRun, answers: list[Judged]) -> None:
    found = classifier_of(small_run)
    assert found.auc > 0.95
    neutral = [i for i, r in enumerate(small_run.rollouts()) if "/neutral/" in r.prompt_id]
    scores, truth = found([answers[i] for i in neutral])[0], np.array([small_run.scores()[i].trait for i in neutral])
    assert np.isfinite(scores).all()
    assert roc_auc_score(truth >= 50, scores) > 0.9 if 0 < (truth >= 50).sum() < len(truth) else np.isfinite(scores).all()


def test_its_auc_is_by_question(copy: Copy) -> None:
    """Answers that give their side away only to who knows other answers to the same question."""

    def scored(record: dict[str, Any]) -> dict[str, Any]:
        return {**record, "trait": 80.0 if "/positive/" in record["key"] else 20.0, "coherence": 90.0}

    def told(record: dict[str, Any]) -> dict[str, Any]:
        _, polarity, instruction, question = record["prompt_id"].split("/")
        side = "a" if (polarity == "positive") == (int(question[1:]) % 2 == 0) else "b"
        return {**record, "text": f"{question}{side} {instruction}", "token_ids": [5]}

    found = classifier_of(copy.change("scores.jsonl", scored).change("rollouts.jsonl", told).run)
    assert found.texts == (100, 100)
    assert found.auc == pytest.approx(0.5, abs=0.02)
    assert text_classifier(*kept_texts(copy.run), "t").auc > 0.9


@pytest.mark.parametrize("part", ["trait", "coherence"])
def test_answers_that_the_filter_drops_are_not_learned(part: str, copy: Copy) -> None:
    before = classifier_of(copy.run)
    kept = set(kept_texts(copy.run)[0])
    dropped = next(f"{r.key}" for r in copy.run.rollouts() if "/positive/" in r.prompt_id and r.text in kept)
    for change in ({part: 10.0}, {part: None, "reason": "unread"}):
        copy.change("scores.jsonl", lambda record, change=change: {**record, **(change if record["key"] == dropped else {})})
        after = classifier_of(copy.run)
        assert after.texts == (before.texts[0] - 1, before.texts[1])
        assert after.identity != before.identity


def test_questions_without_one_side_are_not_learned(copy: Copy) -> None:
    def unread(record: dict[str, Any]) -> dict[str, Any]:
        lost = "/positive/" in record["key"] and record["key"].split("#")[0].endswith("/x00")
        return {**record, **({"trait": 0.0} if lost else {})}

    positive, negative = kept_texts(copy.run)
    after = classifier_of(copy.change("scores.jsonl", unread).run)
    assert after.identity == text_classifier(*kept_texts(copy.run), "t").identity
    assert after.texts[0] < len(positive)
    assert after.texts[1] < len(negative)


@pytest.mark.parametrize("threshold", [30.0, 75.0])
def test_the_filter_is_that_of_the_run(threshold: float, copy: Copy) -> None:
    path = copy.run.path / "run.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["arguments"]["thresholds"]["trait"] = threshold
    path.write_text(json.dumps(manifest), encoding="utf-8")
    by_rule = kept_texts(copy.run, threshold)
    assert by_rule != kept_texts(copy.run)
    assert classifier_of(ExtractionRun(copy.run.path)).identity == text_classifier(*by_rule, "t").identity


def test_neutral_answers_are_not_learned(copy: Copy) -> None:
    before = classifier_of(copy.run)
    after = classifier_of(
        copy.change("rollouts.jsonl", lambda r: {**r, "text": "sunny"} if "/neutral/" in r["prompt_id"] else r).run
    )
    assert after.identity == before.identity


# errors


def test_too_few_texts() -> None:
    with pytest.raises(ScreeningError, match="t: a text classifier needs at least 10 positive texts, not 9: sample more"):
        text_classifier(drawn(1, n=9), drawn(2), "t")
    with pytest.raises(ScreeningError, match="at least 10 negative texts, not 0"):
        text_classifier(drawn(1), [], "t")
    assert text_classifier(drawn(1, n=10), drawn(2, n=10), "t").texts == (10, 10)


def test_questions_that_do_not_fit() -> None:
    with pytest.raises(ScreeningError, match=r"t: there must be one question per text, \(60, 50\) by side, not \(50, 60\)"):
        text_classifier(drawn(1), drawn(2, n=50), "t", questions=(asked_of(50), asked_of(60)))
    with pytest.raises(ScreeningError, match="t: all texts answer 'one', so no question can be left out"):
        text_classifier(drawn(1), drawn(2), "t", questions=(["one"] * 60, ["one"] * 60))
    with pytest.raises(ScreeningError, match="t: all texts answer 'w1 w2', so no question"):
        text_classifier(["w1 w2"] * 10, ["w1 w2"] * 10, "t")
    two = text_classifier(drawn(1), drawn(2), "t", questions=(["one", "two"] * 30, ["one", "two"] * 30))
    assert 0 < two.auc < 1


def test_texts_without_words() -> None:
    with pytest.raises(ScreeningError, match="t: no text has a word"):
        text_classifier(["?", "!"] * 5, ["...", ""] * 5, "t")
    few = text_classifier(["?", "!"] * 5, ["w1", ""] * 5, "t")
    assert np.isfinite(few([Judged("q", "w1")])[0]).all()


def test_a_folder_that_lost_scores(copy: Copy) -> None:
    key = json.loads((copy.run.path / "scores.jsonl").read_text(encoding="utf-8").splitlines()[-1])["key"]
    copy.change("scores.jsonl", lambda record: None if record["key"] == key else record)
    with pytest.raises(RunFolderError, match="copy: holds 220 rollouts and 219 scores: extract anew"):
        classifier_of(copy.run)


@dataclass(frozen=True)
class Written:
    """A rival that gives what it was told to."""

    scores: tuple[float, ...]
    reasons: tuple[str | None, ...]
    name: str = "text: mine"
    identity: str = "1"

    def __call__(self, answers: Sequence[Judged], /) -> tuple[np.ndarray, list[str | None]]:
        return np.array(self.scores, dtype=np.float64), list(self.reasons)


GOOD = Written((1.0, np.nan, -3.0), (None, "unread", None))


def test_a_rival_of_ones_own() -> None:
    assert isinstance(GOOD, Rival)
    scores, reasons = rated(GOOD, [Judged("q", "a")] * 3)
    np.testing.assert_array_equal(scores, [1.0, np.nan, -3.0])
    assert reasons == [None, "unread", None]


@pytest.mark.parametrize(
    ("rival", "message"),
    [
        (replace(GOOD, scores=(1.0,) * 2), r"scores of shape \(2,\) and 3 reasons for 3 answers: it must give one of each"),
        (replace(GOOD, reasons=(None,) * 2), r"scores of shape \(3,\) and 2 reasons for 3 answers"),
        (replace(GOOD, reasons=(None,) * 3), "answer 1 the score nan and the reason None: it must give a finite number"),
        (replace(GOOD, reasons=(None, "", None)), "answer 1 the score nan and the reason ''"),
        (replace(GOOD, reasons=("why", "unread", None)), "answer 0 the score 1.0 and the reason 'why'"),
        (replace(GOOD, scores=(1.0, np.nan, np.inf)), "answer 2 the score inf and the reason None"),
        (replace(GOOD, scores=(1.0, -np.inf, 1.0)), "answer 1 the score -inf and the reason 'unread'"),
    ],
)
def test_a_rival_that_breaks_the_rules(rival: Written, message: str) -> None:
    with pytest.raises(ScreeningError, match="rival 'text: mine' gave " + message):
        rated(rival, [Judged("q", "a")] * 3)
