"""Near copies: the same groups as all pairs give, whatever the order, the blocks and what all texts share."""

import re
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from persona_lens.errors import ScreeningError
from persona_lens.screening.duplicates import (
    Groups,
    _alike,
    _distinct,
    _groups,
    _joined,
    _likely,
    _possible,
    _prefixes,
    _rarest_first,
    _shingle_sets,
    near_duplicates,
)

BIG = 2**21
CHARACTERS = st.text(st.sampled_from("aA .,?-+é\u0301ß中的文กา\U0001f600\ud800\u200b\n\x00"), max_size=6)
TEXTS = st.lists(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=7).map(" ".join), min_size=1, max_size=12)


def partition(groups: Groups) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(groups.of == g).tolist()) for g in range(len(groups.sizes))}


def all_pairs(texts: Sequence[str], similarity: str, shingle: int) -> set[frozenset[int]]:
    """The same from every pair, in exact fractions; for texts of plain words."""
    sets = [shingles(t, shingle) for t in texts]
    found = [{row} for row in range(len(texts))]
    for a, b in combinations(range(len(texts)), 2):
        if Fraction(len(sets[a] & sets[b]), len(sets[a] | sets[b])) >= Fraction(similarity):
            joined = found[a] | found[b]
            for row in joined:
                found[row] = joined
    return {frozenset(group) for group in found}


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall("[a-z0-9]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def edited(words: Sequence[str], share: float, vocabulary: Sequence[str], rng: Random) -> list[str]:
    return [rng.choice(vocabulary) if rng.random() < share else w for w in words]


def corpus(seed: int, n: int = 150, words: int = 400, prefix: str = "") -> list[str]:
    """Some texts with near copies to several degrees and copies of copies; the rest is unrelated."""
    rng = Random(seed)
    vocabulary = [f"w{i}" for i in range(words)]
    texts: list[list[str]] = []
    while len(texts) < n:
        base = rng.choice(texts) if texts and rng.random() < 0.6 else rng.choices(vocabulary, k=rng.randint(1, 60))
        texts.append(edited(base, rng.choice([0, 0.01, 0.03, 0.06]), vocabulary, rng)[rng.choice([0, 0, 1, 3]) :])
    return [prefix + " ".join(t) for t in texts]


def template(seed: int, n: int = 150, values: int = 5, slots: int = 6) -> list[str]:
    """Texts with a slot every five words: most pairs have rare shingles in common, and few pairs differ in one slot only."""
    rng = Random(seed)
    return [" ".join(f"v{rng.randrange(values)}" if i % 5 == 2 else f"w{i}" for i in range(5 * slots)) for _ in range(n)]


# the groups


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.sampled_from(["0.1", "0.34", "0.5", "0.55", "0.8", "0.9", "1"]), st.integers(1, 4), st.sampled_from([1, 5, BIG]))
@example(["a b c d", "d c b a", "a b c d a"], "0.5", 2, 1)
def test_groups_are_those_of_all_pairs(texts: list[str], similarity: str, shingle: int, block: int) -> None:
    found = near_duplicates(texts, similarity=float(similarity), shingle=shingle, block=block)
    assert partition(found) == all_pairs(texts, similarity, shingle)


@pytest.mark.parametrize("similarity", ["0.3", "0.5", "0.7", "0.8", "0.9"])
@pytest.mark.parametrize("seed", range(6))
def test_groups_of_copies_of_copies_are_those_of_all_pairs(seed: int, similarity: str) -> None:
    texts = corpus(seed) if seed % 2 else template(seed)
    expected = all_pairs(texts, similarity, 3)
    assert partition(near_duplicates(texts, similarity=float(similarity))) == expected
    assert partition(near_duplicates(texts, similarity=float(similarity), block=300)) == expected


def test_the_corpora_have_groups_of_several_sizes() -> None:
    for texts in (corpus(1), template(0)):
        sizes = [len(g) for g in all_pairs(texts, "0.8", 3)]
        assert sizes.count(1) >= 5
        assert sum(1 < size < 10 for size in sizes) >= 3


@pytest.mark.parametrize("seed", range(12))
def test_groups_of_random_sets_are_those_of_all_pairs(seed: int) -> None:
    """Sets of common elements and some rare ones, of all sizes: much is shared that makes no pair."""
    rng = Random(seed)
    texts = []
    for _ in range(120):
        chosen = [f"c{i}" for i in range(12) if rng.random() < 0.8] + [f"r{rng.randrange(40)}" for _ in range(rng.randrange(4))]
        texts.append(" ".join(rng.sample(chosen, len(chosen))))
    for similarity in ("0.6", "0.75", "0.9"):
        assert partition(near_duplicates(texts, similarity=float(similarity), shingle=1)) == all_pairs(texts, similarity, 1)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_pair_is_found_whose_likely_partner_is_another(swapped: bool) -> None:
    """Two sets with one rare element in common, which a third one has first; one of the two is the other and more."""
    small = " ".join(f"a{i}" for i in range(8))
    large = f"x y {small}"
    third = "a0 " + " ".join(f"c{i}" for i in range(9))
    often = [
        " ".join([f"c{i}" for i in range(9)] + [f"a{i}" for i in range(1, 8)] + [f"o{k}{i}" for i in range(9)]) for k in range(9)
    ]
    pair = [large, small] if swapped else [small, large]
    found = near_duplicates([third, *pair, *often], shingle=1)
    assert found.of.tolist() == [0, 1, 1, *range(2, 11)]


@settings(max_examples=100, deadline=None)
@given(st.lists(CHARACTERS, max_size=10), st.randoms(use_true_random=False))
def test_the_order_does_not_matter_and_equal_texts_are_together(texts: list[str], rng: Random) -> None:
    texts = texts + texts[:3]
    found = near_duplicates(texts)
    order = rng.sample(range(len(texts)), len(texts))
    again = near_duplicates([texts[i] for i in order])
    assert {frozenset(order[i] for i in g) for g in partition(again)} == partition(found)
    for text in texts:
        assert len({int(g) for t, g in zip(texts, found.of, strict=True) if t == text}) == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_near_copies_does_not_matter(seed: int) -> None:
    texts = corpus(seed, n=400)
    order = np.random.default_rng(seed).permutation(len(texts))
    again = near_duplicates([texts[i] for i in order])
    assert {frozenset(order[list(g)].tolist()) for g in partition(again)} == partition(near_duplicates(texts))


def test_groups_are_numbered_and_represented_by_their_first_rows() -> None:
    found = near_duplicates(["x", "y", "x", "z", "y", "x"])
    assert found.of.tolist() == [0, 1, 0, 2, 1, 0]
    assert found.representatives.tolist() == [0, 1, 3]
    assert found.sizes.tolist() == [3, 2, 1]
    any_labels = _groups(np.array([7, 2, 7, 2, 5]))
    assert (any_labels.of.tolist(), any_labels.representatives.tolist()) == ([0, 1, 0, 1, 2], [0, 1, 4])
    assert any_labels.sizes.tolist() == [2, 2, 1]
    mixed = near_duplicates(corpus(5))
    firsts = [int(np.flatnonzero(mixed.of == g)[0]) for g in range(len(mixed.sizes))]
    assert mixed.representatives.tolist() == firsts == sorted(firsts)
    assert mixed.sizes.tolist() == np.bincount(mixed.of).tolist()


def test_a_chain_joins_its_unlike_ends() -> None:
    words = [f"w{i}" for i in range(60)]
    chain = [" ".join(words[i : i + 40]) for i in range(0, 21, 2)]
    assert near_duplicates(chain).sizes.tolist() == [11]
    assert near_duplicates([chain[0], chain[-1]]).sizes.tolist() == [1, 1]
    assert near_duplicates([chain[i] for i in range(11) if i not in (4, 5, 6)]).sizes.tolist() == [4, 4]


@pytest.mark.parametrize(("shared", "of", "similarity"), [(4, 5, 0.8), (11, 20, 0.55), (7, 25, 0.28), (29, 50, 0.58)])
def test_what_just_reaches_the_threshold_is_a_copy(shared: int, of: int, similarity: float) -> None:
    """Also where similarity x union is not a whole number in floating point though it is one."""
    whole, part = (" ".join(f"w{i}" for i in range(n)) for n in (of, shared))
    assert near_duplicates([whole, part], similarity=similarity, shingle=1).sizes.tolist() == [2]
    assert near_duplicates([whole, part], similarity=similarity + 1e-6, shingle=1).sizes.tolist() == [1, 1]


def test_three_words_are_a_shingle_and_eight_tenths_near() -> None:
    words = [f"w{i}" for i in range(38)]  # 36 shingles, of which a word in the middle changes three: 33 of 39
    one, two = (" ".join("x" if i in changed else w for i, w in enumerate(words)) for changed in ([9], [9, 20]))
    assert near_duplicates([" ".join(words), one]).of.tolist() == [0, 0]
    assert near_duplicates([" ".join(words), two]).of.tolist() == [0, 1]  # 30 of 42
    assert near_duplicates([" ".join(words), two], shingle=2).of.tolist() == [0, 0]  # 33 of 41
    assert near_duplicates([" ".join(words), two], similarity=0.7).of.tolist() == [0, 0]


# unrelated texts


def test_unrelated_texts_stay_apart() -> None:
    rng = Random(0)
    texts = [" ".join(f"w{rng.randrange(3000)}" for _ in range(rng.randint(5, 60))) for _ in range(500)]
    assert near_duplicates(texts).sizes.tolist() == [1] * 500


def test_texts_that_begin_alike_stay_apart() -> None:
    start = " ".join(f"s{i}" for i in range(30)) + " "
    rng = Random(0)
    texts = [start + " ".join(f"w{rng.randrange(3000)}" for _ in range(30)) for _ in range(300)]
    assert near_duplicates(texts).sizes.tolist() == [1] * 300
    copied = corpus(3, prefix=start)
    assert partition(near_duplicates(copied)) == all_pairs(copied, "0.8", 3)


def test_fillings_of_one_template_are_no_copies() -> None:
    rng = Random(0)
    texts = [" ".join(f"v{rng.randrange(20)}" if i % 10 == 5 else f"w{i}" for i in range(100)) for _ in range(100)]
    assert near_duplicates(texts).sizes.tolist() == [1] * 100
    assert len(near_duplicates(texts, shingle=1).sizes) < 5


# what is little or odd


def test_no_text_and_one_text() -> None:
    nothing = near_duplicates([])
    assert (len(nothing.of), len(nothing.representatives), len(nothing.sizes)) == (0, 0, 0)
    one = near_duplicates([""])
    assert (one.of.tolist(), one.representatives.tolist(), one.sizes.tolist()) == ([0], [0], [1])


def test_all_texts_alike() -> None:
    found = near_duplicates(["The same, all the same."] * 5000)
    assert (found.of.tolist(), found.representatives.tolist(), found.sizes.tolist()) == ([0] * 5000, [0], [5000])


@pytest.mark.parametrize(
    "alike",
    [
        ["Yes", "yes.", " “YES”! ", "yes\n"],
        ["", " ", "\n\t"],
        ["caf\u00e9", "cafe\u0301", "CAFÉ"],
        ["straße", "STRASSE"],
        ["ok - fine", "ok: - (fine)"],
        ["...", "…", " ... "],
        ["我喜欢吃苹果和香蕉也喜欢喝茶还有跑步看书听音乐", "我喜欢吃苹果和香蕉,也喜欢喝茶。还有跑步、看书、听音乐"],
        ["ha ha ha ha", "ha ha ha ha ha ha"],
    ],
    ids=str,
)
def test_short_texts_that_are_alike(alike: list[str]) -> None:
    assert near_duplicates([*alike, "something else"]).of.tolist() == [0] * len(alike) + [1]


@pytest.mark.parametrize(
    "different",
    [
        ["yes", "no", "yes yes", "yes no", "no yes", "yes no yes", ""],
        ["hello world", "hello there", "hello world again"],
        ["2 + 2", "2 - 2", "22", "C", "C++", "C#"],
        ["...", "?!", "", "\U0001f600", "\U0001f621", "\ud800", "\ud801"],
        ["我喜欢吃苹果", "他讨厌喝茶水", "我", "他"],
        ["a b c", "ab c", "a bc", "abc"],
        ["की", "के"],
    ],
    ids=str,
)
def test_short_texts_that_are_different(different: list[str]) -> None:
    assert near_duplicates(different).of.tolist() == list(range(len(different)))


def test_scripts_without_spaces_have_words() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(60))
    changed = text[:30] + "\u9f98" + text[31:]
    assert near_duplicates([text, changed, text[::-1]]).of.tolist() == [0, 0, 1]
    thai = "".join(chr(0x0E01 + i) for i in range(40))
    assert near_duplicates([thai, thai[:-1], thai[::-1]]).of.tolist() == [0, 0, 1]


# what it costs


def peak(texts: Sequence[str], **options: int) -> float:
    """Megabytes held at once."""
    tracemalloc.start()
    try:
        near_duplicates(texts, **options)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def test_what_all_texts_share_costs_no_more_than_other_words() -> None:
    """All pairs of these texts share shingles: to hold them took 100 MB."""
    words = [f"w{i}" for i in range(5000)]
    rng = Random(0)
    own = [" ".join(rng.choices(words, k=30)) for _ in range(2000)]
    start = " ".join(words[:10])
    assert peak([f"{start} {t}" for t in own]) < 1.5 * peak([" ".join(rng.choices(words, k=10)) + " " + t for t in own])


def test_blocks_bound_memory() -> None:
    texts = template(0, n=1500, values=20, slots=12)
    assert near_duplicates(texts).sizes.tolist() == [1] * 1500
    assert peak(texts, block=2**12) < 0.3 * peak(texts)


def test_a_large_group_of_near_copies_is_not_compared_within() -> None:
    """Once near copies of one text are one group, their pairs, which all share shingles, are not held: that took 200 MB."""
    rng = Random(0)
    words = [f"w{i}" for i in range(100)]
    copies = [" ".join([*words[:k], f"x{rng.randrange(30)}", *words[k + 1 :]]) for k in rng.choices(range(100), k=2000)]
    assert near_duplicates([" ".join(words), *copies]).sizes.tolist() == [2001]
    assert peak([" ".join(words), *copies]) < 40


def test_equal_texts_are_not_compared() -> None:
    """Even where others have each of their shingles first, so that their likely partners are none."""
    words = [f"w{i}" for i in range(30)]
    texts = [*(" ".join(words[i : i + 3]) for i in range(28)), *[" ".join(words)] * 3000]
    assert near_duplicates(texts).sizes.tolist() == [1] * 28 + [3000]
    assert peak(texts) < 20


def compared(texts: Sequence[str], labels: Sequence[int] | None = None, shingle: int = 3) -> list[tuple[int, int]]:
    """The pairs of different texts that are compared once these labels are known."""
    sets = _rarest_first(_distinct(_shingle_sets(texts, shingle))[0])
    known = np.arange(len(texts)) if labels is None else np.array(labels)
    parts = list(_possible(sets, _prefixes(sets, 0.8), known, 0.8, BIG))
    return [(min(int(a), int(b)), max(int(a), int(b))) for x, y in parts for a, b in zip(x, y, strict=True)]


def test_few_pairs_are_compared() -> None:
    texts = template(0, n=400, values=20, slots=12)
    assert len(set(texts)) == 400
    assert len(compared(texts)) < 0.005 * 400 * 399 / 2


def test_texts_of_unlike_lengths_are_not_compared() -> None:
    """Not even where the long one has all words of the short one, and rare words enough to show little of them in its prefix."""
    small, frequent = ([f"{letter}{i}" for i in range(40)] for letter in "af")
    large = [*(f"u{i}" for i in range(20)), *small, *frequent]
    others = [" ".join([*frequent, *(f"o{k}{i}" for i in range(40))]) for k in range(5)]
    assert compared([" ".join(small), " ".join(large), *others], shingle=1) == []
    assert compared([" ".join(small), " ".join(small[4:]), *others], shingle=1) == [(0, 1)]


def test_few_pairs_join_most_copies_of_one_text() -> None:
    """Copies that are too unlike each other are near copies of the original, which has its shingles first."""
    rng = Random(0)
    words = [f"w{i}" for i in range(100)]
    copies = [" ".join(edited(words, rng.choice([0.01, 0.03, 0.04]), [f"x{i}" for i in range(900)], rng)) for _ in range(400)]
    sets = _rarest_first(_distinct(_shingle_sets([*copies, " ".join(words)], 3))[0])
    a, b = _likely(_prefixes(sets, 0.8))
    n = len(sets.indptr) - 1
    assert len(a) == len(set(zip(a.tolist(), b.tolist(), strict=True))) < 5 * n
    joined = _joined(np.arange(n), a, b, _alike(sets, a, b, 0.8, BIG))
    final = near_duplicates([*copies, " ".join(words)])
    assert len(final.sizes) < 0.4 * n
    assert len(np.unique(joined)) <= len(final.sizes) + 3


def test_pairs_are_compared_once_and_never_within_a_group() -> None:
    texts = [" ".join(f"w{i}" for i in range(100) if i != k) for k in range(9)]
    assert sorted(compared(texts)) == list(combinations(range(9), 2))
    labels = [0, 1, 1, 0, 2, 1, 2, 2, 3]
    assert sorted(compared(texts, labels)) == [(a, b) for a, b in combinations(range(9), 2) if labels[a] != labels[b]]


# errors


@pytest.mark.parametrize("similarity", [0.0, -0.1, 1.01, float("nan")])
def test_similarity_out_of_range(similarity: float) -> None:
    with pytest.raises(ScreeningError, match=re.escape(f"similarity must be above 0 and at most 1, not {similarity}")):
        near_duplicates(["a"], similarity=similarity)


@pytest.mark.parametrize(("option", "shown"), [({"shingle": 0}, f"0 and {BIG}"), ({"block": 0}, "3 and 0")])
def test_shingle_and_block_out_of_range(option: dict[str, int], shown: str) -> None:
    with pytest.raises(ScreeningError, match=f"shingle and block must be at least 1, not {shown}: leave them out"):
        near_duplicates(["a"], **option)
