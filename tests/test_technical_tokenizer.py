"""The published technical tokenizer, id by id, and its lossless successor."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_engine.errors import InputError, ModelError, UsageError
from rlm_engine.tokenizer import technical
from rlm_engine.tokenizer.file import FileTokenizer
from rlm_engine.tokenizer.technical import SPECIAL_TOKENS, TechnicalTokenizer, merge_in_file_order, read_merges
from rlm_engine.tokenizer.technical_training import train_technical

DATA = Path(__file__).parent / "data"
# Further vectors may lie in directories that the environment variable RLM_GOLDEN_DIRS names.
ROOTS = [DATA, *map(Path, filter(None, os.environ.get("RLM_GOLDEN_DIRS", "").split(os.pathsep)))]
DIRECTORIES = [found.parent for root in ROOTS for found in sorted(root.glob("tokenizer*/golden.json"))]


def golden(directory: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((directory / "golden.json").read_text(encoding="utf-8"))


CASES = [
    pytest.param(directory, pair, id=f"{directory.name}-{pair.get('name', pair['text'])}")
    for directory in DIRECTORIES
    for pair in golden(directory)["pairs"]
]


@pytest.fixture(scope="module")
def tokenizer() -> TechnicalTokenizer:
    return TechnicalTokenizer.from_directory(DATA / "tokenizer")


@pytest.mark.parametrize(("directory", "pair"), CASES)
def test_published_ids(directory: Path, pair: dict) -> None:  # type: ignore[type-arg]
    tokenizer = TechnicalTokenizer.from_directory(directory)
    text, ids = pair["text"], tokenizer.encode_published(pair["text"])
    for key in ("ids", "ids_in_memory", "ids_after_load"):
        if key in pair:
            assert ids == pair[key], key
    if "ids" in pair:
        assert technical.normalize(text) == pair["normalized"]
        assert list(technical.words(text, allow_special=True)) == pair["pre_tokens"]
        assert tokenizer.encode(text, allow_special=True) == pair["ids_no_special"]
        assert tokenizer.decode(ids) == pair["decoded"]
        assert tokenizer.decode(ids, skip_special=False) == pair["decoded_keep_special"]


def test_broken_merge_lines_are_recovered_from_the_vocabulary() -> None:
    directory = DATA / "tokenizer_ws"
    vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    merges = read_merges((directory / "merges.txt").read_text(encoding="utf-8"), vocabulary)
    assert [list(pair) for pair in merges] == golden(directory)["merges_in_memory"]


pieces = st.text(alphabet="ab \n<", min_size=1, max_size=3)


@given(st.lists(st.tuples(pieces, pieces), max_size=12))
def test_merges_with_spaces_and_newlines_survive_the_file(pairs: list[tuple[str, str]]) -> None:
    """As training makes them: parts are known already, each union gets the next id."""
    vocabulary = {text: i for i, text in enumerate([*SPECIAL_TOKENS, "\n", " ", "<", "a", "b"])}
    merges = []
    for left, right in pairs:
        if left in vocabulary and right in vocabulary and left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
    text = "".join(f"{left} {right}\n" for left, right in merges)
    read = read_merges(text, vocabulary)
    assert [left + right for left, right in read] == [left + right for left, right in merges]


def test_merges_that_fit_nothing_are_left_out() -> None:
    vocabulary = {text: i for i, text in enumerate([*SPECIAL_TOKENS, "a", "b", "ab"])}
    assert read_merges("a b\nbroken\na b c\n\n", vocabulary) == [("a", "b")]


def naive(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The definition: all merges in file order, each over the whole word from left to right."""
    parts = list(word)
    for left, right in merges:
        i = 0
        while i < len(parts) - 1:
            if parts[i] == left and parts[i + 1] == right:
                parts[i : i + 2] = [left + right]
            else:
                i += 1
    return parts


part = st.text(alphabet="ab", min_size=1, max_size=4)


@settings(max_examples=500)
@given(st.text(alphabet="abc", max_size=24), st.lists(st.tuples(part, part), max_size=25))
def test_heap_equals_the_loop_over_all_merges(word: str, merges: list[tuple[str, str]]) -> None:
    """Repeated pairs and merges that come too late included."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair, []).append(rank)
    assert merge_in_file_order(word, ranks) == naive(word, merges)


def test_a_merge_possible_only_after_its_place_is_not_applied() -> None:
    assert merge_in_file_order("abc", {("ab", "c"): [0], ("a", "b"): [1]}) == ["ab", "c"]


def test_typed_special_tokens_stay_text(tokenizer: TechnicalTokenizer) -> None:
    control = set(tokenizer.special.values())
    marks = [*SPECIAL_TOKENS, "<|user|>", "<|system|>", "<|assistant|>", "<|endoftext|>", "< |user|>", "＜user＞"]
    for mark in marks:
        assert not control & set(tokenizer.encode(f"a {mark} b{mark}")), mark
    assert tokenizer.encode("<|user|> hello", allow_special=True)[0] == tokenizer.special["<user>"] == 5


@settings(max_examples=200)
@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*SPECIAL_TOKENS, "<|user|>", "`", "```", "\t"]))))
def test_no_typed_text_makes_a_special_token(tokenizer: TechnicalTokenizer, parts: list[str]) -> None:
    ids = tokenizer.encode("".join(parts))
    assert not set(tokenizer.special.values()) & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode_readable(ids) == b"".join(map(tokenizer.token_bytes, ids)).decode()


@given(st.text(alphabet="ab.@-_é %1|Z\n", max_size=40))
def test_mail_addresses_are_replaced_as_by_the_plain_pattern(text: str) -> None:
    plain = re.sub(r"\b[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Z|a-z]{2,}\b", "<EMAIL>", text)
    assert technical._without_mail(text) == plain


@given(st.text(alphabet="a<>`' 1.@:/hpt\n", max_size=40))
def test_words_are_those_of_the_one_pattern(text: str) -> None:
    assert list(technical.words(text, False)) == technical._WORD.findall(technical.normalize(text))


def test_readable_decoding(tokenizer: TechnicalTokenizer) -> None:
    ids = tokenizer.encode("The model guesses 56\tnext.")
    assert tokenizer.decode_readable(ids) == " The model guesses56\t next."
    assert tokenizer.decode_readable([2, *ids, 1, 3]) == " The model guesses56\t next.\ufffd"


def test_hostile_texts_take_linear_time(tokenizer: TechnicalTokenizer) -> None:
    started = time.process_time()
    for text in ("<" * 50_000, "a." * 25_000, "a.@" * 20_000, "`" * 50_000, "<|user|>" * 6_000, "ab`" + "ab " * 15_000):
        tokenizer.encode(text)
    tokenizer.encode("```" + "token" * 8_000 + "```")
    assert time.process_time() - started < 5


def test_half_a_surrogate_pair_is_refused(tokenizer: TechnicalTokenizer) -> None:
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must map"),
        ('{"<pad>": 7}', "ids must be"),
        (json.dumps({text: i for i, text in enumerate(reversed(SPECIAL_TOKENS))}), "must have id 0"),
        (json.dumps({**{text: i for i, text in enumerate(SPECIAL_TOKENS)}, "a": 3}), "share an id"),
    ],
)
def test_damaged_vocabularies_are_refused(tmp_path: Path, vocabulary: str, message: str) -> None:
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ModelError, match=message):
        TechnicalTokenizer.from_directory(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"vocab\.json"):
        TechnicalTokenizer.from_directory(tmp_path)


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    directory = tmp_path_factory.mktemp("lossless")
    conversation = {"messages": [{"role": "user", "content": "Sort the list"}, {"role": "assistant", "content": "Ok"}]}
    chat = directory / "chat.jsonl"
    chat.write_text(json.dumps(conversation) + "\n" + json.dumps({"text": "Sort it, Ok? Sort the list."}) + "\n")
    trained = train_technical([DATA / "tokenizer" / "train_text.txt", chat], vocab_size=400)
    trained.save(str(directory / "tokenizer.json"))
    return FileTokenizer.from_directory(directory)


@settings(max_examples=300)
@given(st.one_of(st.text(), st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "x_1 = 2x\n\t", "é"])).map("".join)))
def test_lossless_tokenizer_returns_every_text(lossless: FileTokenizer, text: str) -> None:
    ids = lossless.encode(text)
    assert lossless.decode(ids) == text
    assert not set(lossless.special.values()) & set(ids)


def test_lossless_tokenizer_keeps_the_special_ids_and_learns_words(lossless: FileTokenizer) -> None:
    assert lossless.special == {text: i for i, text in enumerate(SPECIAL_TOKENS)}
    assert 300 < lossless.vocab_size <= 400
    assert len(lossless.encode(" the tokenizer")) <= 4
    assert lossless.encode("<user>Sort", allow_special=True)[0] == 5
    assert len(lossless.encode("2024")) == 4
    texts = [lossless.token_bytes(i) for i in range(lossless.vocab_size)]
    assert not any(b"|user" in text or b"assistant" in text for text in texts[14:])


def test_training_is_deterministic() -> None:
    file = DATA / "tokenizer" / "train_text.txt"
    assert train_technical([file], 350).to_str() == train_technical([file], 350).to_str()


@pytest.mark.parametrize("line", ["A tree, a house.", '{"text": "A tree, a house."}'])
def test_training_skips_a_byte_order_mark(line: str, tmp_path: Path) -> None:
    file = tmp_path / ("a.jsonl" if line.startswith("{") else "a.txt")
    file.write_text(line, encoding="utf-8")
    plain = train_technical([file], 350).to_str()
    file.write_text(line, encoding="utf-8-sig")
    assert train_technical([file], 350).to_str() == plain


def test_training_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.csv", "x", "only .txt"),
        ("a.jsonl", '{"text": "x"}\n{"nothing": 1}\n', "line 2"),
        ("b.jsonl", "{\n", "line 1: not valid JSON"),
        ("empty.txt", "", "no text"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            train_technical([tmp_path / name])
    with pytest.raises(InputError, match="cannot be read"):
        train_technical([tmp_path / "missing.txt"])
    with pytest.raises(UsageError, match="at least 270"):
        train_technical([], vocab_size=100)
