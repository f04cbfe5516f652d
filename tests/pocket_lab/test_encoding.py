"""Token ids and loss mask: equal to the rendered chat template, exactly the learned answers, whatever the number of workers."""

import unicodedata
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from persona_lens.pocket.instructions import DEFAULT_SYSTEM
from persona_lens.pocket_lab.corpus import Document, Turn, document, documents
from persona_lens.pocket_lab.encoding import CHUNK, EncodedCorpus, encode_corpus, segments
from persona_lens.pocket_lab.tokenizer import (
    CONTEXT,
    END_OF_TEXT,
    IM_END,
    IM_START,
    SPECIAL,
    VOCABULARY,
    build_tokenizer,
    save_tokenizer,
)

SEED, N = 3, 120


@cache
def docs() -> list[Document]:
    return list(documents(SEED, range(N)))


@cache
def texts(n: int) -> list[str]:
    return [text for doc in documents(11, range(n)) for text, _ in segments(doc)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(build_tokenizer(texts(250)), path)
    return path


@pytest.fixture(scope="module")
def raw(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoded(folder: Path) -> EncodedCorpus:
    return encode_corpus(folder / "tokenizer.json", SEED, range(N))


def messages(doc: Document) -> list[dict[str, str]]:
    system = [{"role": "system", "content": doc.system}] if doc.system else []
    return system + [
        m for t in doc.turns for m in ({"role": "user", "content": t.user}, {"role": "assistant", "content": t.assistant})
    ]


def ids_of(encoded: EncodedCorpus, i: int) -> list[int]:
    return encoded.ids[encoded.starts[i] : encoded.starts[i + 1]].tolist()


def learned_of(encoded: EncodedCorpus, i: int) -> list[bool]:
    return encoded.learned[encoded.starts[i] : encoded.starts[i + 1]].tolist()


def test_segments_encoded_alone_equal_the_rendered_chat_template(encoded, tokenizer) -> None:
    assert {doc.system is None for doc in docs()} == {True, False}
    for i in range(N):
        doc = docs()[i]
        assert "".join(text for text, _ in segments(doc)) == tokenizer.apply_chat_template(messages(doc), tokenize=False)
        rendered = tokenizer.apply_chat_template(messages(doc))["input_ids"]
        assert ids_of(encoded, i) == rendered[:CONTEXT]
        assert len(rendered) <= CONTEXT


def test_another_cut_between_segments_would_not_equal_the_rendered_template(raw: Tokenizer, tokenizer) -> None:
    doc = docs()[0]
    whole = "".join(text for text, _ in segments(doc))
    cut = whole.index(doc.turns[0].user) + 3  # inside the first word of the user
    halves = raw.encode(whole[:cut]).ids + raw.encode(whole[cut:]).ids
    assert halves != tokenizer.apply_chat_template(messages(doc))["input_ids"]
    assert raw.encode(whole).ids == tokenizer.apply_chat_template(messages(doc))["input_ids"]


def test_an_answer_begins_where_the_generation_prompt_ends(encoded, tokenizer) -> None:
    for i in range(30):
        doc = docs()[i]
        for k in range(1, len(doc.turns) + 1):
            prompt = tokenizer.apply_chat_template(messages(doc)[: -1 - 2 * (len(doc.turns) - k)], add_generation_prompt=True)
            ids = prompt["input_ids"]
            assert ids_of(encoded, i)[: len(ids)] == ids
            learned = learned_of(encoded, i)
            assert not learned[len(ids) - 1]
            assert learned[len(ids)] is doc.turns[k - 1].learned


def test_the_mask_covers_exactly_the_learned_answers_and_their_end_marker(encoded, tokenizer) -> None:
    unlearned = 0
    for i in range(N):
        doc = docs()[i]
        pairs = zip(ids_of(encoded, i), learned_of(encoded, i), strict=True)
        runs = [[token for token, _ in run] for counts, run in groupby(pairs, key=lambda pair: pair[1]) if counts]
        assert [tokenizer.decode(run) for run in runs] == [turn.assistant + IM_END for turn in doc.turns if turn.learned]
        unlearned += sum(not turn.learned for turn in doc.turns)
    assert unlearned > 5


def test_documents_lie_end_to_end_and_end_in_the_newline_of_the_template(encoded, tokenizer) -> None:
    assert len(encoded) == N
    assert encoded.starts[0] == 0
    assert encoded.starts[-1] == len(encoded.ids) == len(encoded.learned) == encoded.lengths.sum()
    for i in range(N):
        ids = ids_of(encoded, i)
        assert ids[0] == tokenizer.convert_tokens_to_ids(IM_START)
        assert tokenizer.decode(ids[-2:]) == f"{IM_END}\n"
        assert learned_of(encoded, i)[-2:] == [docs()[i].turns[-1].learned, False]


def test_a_conversation_without_a_system_prompt_gets_the_default_one(encoded, tokenizer) -> None:
    default = f"{IM_START}system\n{DEFAULT_SYSTEM}{IM_END}\n"
    seen = set()
    for i in range(N):
        doc = docs()[i]
        seen.add(doc.system is None)
        start = f"{IM_START}system\n{doc.system}{IM_END}\n" if doc.system else default
        assert tokenizer.decode(ids_of(encoded, i)).startswith(start)
    assert seen == {True, False}
    hello = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(hello, tokenize=False) == f"{default}{IM_START}user\nHello{IM_END}\n"
    given_one = [{"role": "system", "content": "Be brief."}, *hello]
    assert DEFAULT_SYSTEM not in tokenizer.apply_chat_template(given_one, tokenize=False)


def test_the_template_refuses_a_role_it_does_not_know(tokenizer) -> None:
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_two_workers_encode_what_one_does_in_the_same_order(folder: Path) -> None:
    file, indices = folder / "tokenizer.json", range(0, 4 * (CHUNK + 40), 4)
    two = encode_corpus(file, SEED, indices, workers=2)  # two chunks
    assert len(two) == CHUNK + 40
    for first, last in ((0, 60), (CHUNK - 1, CHUNK), (CHUNK, CHUNK + 40)):
        one = encode_corpus(file, SEED, indices[first:last], workers=1)
        piece = slice(two.starts[first], two.starts[last])
        np.testing.assert_array_equal(one.ids, two.ids[piece])
        np.testing.assert_array_equal(one.learned, two.learned[piece])
        np.testing.assert_array_equal(one.starts, two.starts[first : last + 1] - two.starts[first])


def test_shuffled_systems_are_encoded_with_the_same_answers(folder: Path, encoded) -> None:
    shuffled = encode_corpus(folder / "tokenizer.json", SEED, range(40), shuffle_systems=True)
    end = encoded.starts[40]
    assert len(shuffled.ids) != end or (shuffled.ids != encoded.ids[:end]).any()
    np.testing.assert_array_equal(shuffled.ids[shuffled.learned], encoded.ids[:end][encoded.learned[:end]])


def test_a_document_longer_than_the_context_is_cut(folder: Path, tokenizer) -> None:
    index = 1288  # 24 turns
    rendered = tokenizer.apply_chat_template(messages(document(17, index)))["input_ids"]
    assert len(rendered) > CONTEXT
    cut = encode_corpus(folder / "tokenizer.json", 17, range(index, index + 1))
    assert cut.ids.tolist() == rendered[:CONTEXT]
    assert len(cut.learned) == CONTEXT


TEXTS = (
    "Ça va, Zoë? Ångström naïve façade",
    "日本語の文章と中文字符",
    "👍🏽 👩‍👩‍👧 🇯🇵",
    "tab\tnew\nline  two  blanks ",
    "1234567890 3.14",
    "don't I'll we've",
    "Ω≈ç√∫˜µ",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_any_script_comes_back(text: str, tokenizer) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert len(ids) >= len(text.split())


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=60))
@example(text="e\u0301")
def test_any_text_comes_back_in_composed_form(text: str, tokenizer) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=60))
@example(text="ﬁve ½ cups")
def test_the_file_and_the_loaded_tokenizer_give_the_same_ids(text: str, raw: Tokenizer, tokenizer) -> None:
    assert raw.encode(text).ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_tokenizer_loads_as_qwens_with_its_markers_as_single_tokens(tokenizer) -> None:
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    assert len(tokenizer) <= VOCABULARY
    for marker in SPECIAL:
        assert len(tokenizer(marker, add_special_tokens=False)["input_ids"]) == 1
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (IM_END, END_OF_TEXT, None)
    assert tokenizer.model_max_length == CONTEXT
    assert tokenizer("hello")["input_ids"] == tokenizer("hello", add_special_tokens=False)["input_ids"]


def test_the_tokenizer_needs_about_one_token_per_word_of_the_corpus(tokenizer) -> None:
    answers = " ".join(turn.assistant for doc in documents(12, range(30)) for turn in doc.turns)
    words = len(answers.split())
    tokens = len(tokenizer(answers)["input_ids"])
    assert tokens / words < 1.6
    foreign = "Vexillological quandaries bewitched Zdzisław Krzyżanowski"
    assert len(tokenizer(foreign)["input_ids"]) > 3 * len(foreign.split())


def test_the_tokenizer_is_the_same_for_the_same_texts() -> None:
    first, again = (build_tokenizer(texts(250)[:40]).to_str() for _ in range(2))
    assert first == again
    assert build_tokenizer(texts(250)[:60]).to_str() != first


def test_segments_spell_out_a_document() -> None:
    doc = Document("default", "Be brief.", (Turn("Hi?", "Yes.", learned=False), Turn("So?", "No.")), document(0, 0).persona)
    assert list(segments(doc)) == [
        ("<|im_start|>system\nBe brief.<|im_end|>\n", False),
        ("<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes.<|im_end|>", False),
        ("\n", False),
        ("<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n", False),
        ("No.<|im_end|>", True),
        ("\n", False),
    ]
