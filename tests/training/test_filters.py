"""Clean-up, filters at their borders, duplicates, contamination."""

from __future__ import annotations

import itertools
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpus_files import conversation, sentence, texts, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_engine.errors import InputError, UsageError
from rlm_training.contamination import Contamination
from rlm_training.corpus import Document, parse_record
from rlm_training.duplicates import NearDuplicates, bands_for, digest, is_held_out, signature
from rlm_training.filters import clean, clean_document, ends_properly, judge, preset
from rlm_training.ngrams import gram_hashes, grams_of_lengths, word_hashes


def verdict(names: str, document: Document | str) -> str | None:
    document = Document(text=document) if isinstance(document, str) else document
    return judge(document, preset(names).rules)


def chat(*turns: str) -> Document:
    return parse_record(conversation(*turns), "")


def of_length(characters: int, mark: str = ".") -> str:
    """Three-letter words, ending in a mark."""
    return ("abc " * characters)[: characters - 2] + "d" + mark


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\x0cd\u2028e", "a\nb\nc\nd\ne"),
        ("a\x00b\x1bc\x7fd\x85e\u202ef\ufeffg\uffff", "abcdefg"),
        ("tab\tstays", "tab\tstays"),
        ("half \ud83d emoji \U0001f600", "half \ufffd emoji \U0001f600"),
        ("e\u0301", "é"),
        ("\n\nouter\n\n", "outer"),
    ],
)
def test_clean_up(text: str, expected: str) -> None:
    assert clean(text) == expected


@settings(max_examples=50)
@given(st.text(st.characters(codec=None), max_size=60))
def test_clean_text_is_utf8_in_nfc_and_stays_as_it_is(text: str) -> None:
    cleaned = clean(text)
    cleaned.encode("utf-8")
    assert unicodedata.is_normalized("NFC", cleaned) and clean(cleaned) == cleaned
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in cleaned)


def test_cleaning_reaches_every_part_of_a_document() -> None:
    pair = {"prompt": "a\x00", "chosen": " b\x00 ", "rejected": "c\r\n"}
    cleaned = clean_document(parse_record(pair, ""))
    assert (cleaned.messages[0]["content"], cleaned.chosen, cleaned.rejected) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("names", "text", "reason"),
    [
        ("none", "x", None),
        ("none", " \n", "empty"),
        ("90m", of_length(79), "too short"),
        ("90m", of_length(80), None),
        ("90m", of_length(6000), None),
        ("90m", of_length(6001), "too long"),
        ("90m", of_length(90, "d"), "no punctuation"),
        ("90m", "abcdefgh " * 13 + "end.", "few words"),
        ("90m", "abcdefgh " * 14 + "end.", None),
        ("90m", "a. " * 20 + "b" * 20, "few letters"),
        ("90m", "aaaa. " * 15 + "aaaaa.....", "few letters"),  # 65 letters of 100: not more than 65 %
        ("90m", "aaaa. " * 15 + "aaaaaa....", None),
        ("mor", of_length(49), "too short"),
        ("mor", of_length(50), None),
        ("mor", of_length(400), None),
        ("mor", of_length(401), "too long"),
        ("mor", "abcdefghij " * 6 + "end.", "few words"),
        ("mor", "abcdefghij " * 7 + "end.", None),
        ("mor", "see https://example.org " + of_length(60), "URL"),
        ("mor", "see WWW.example.org " + of_length(60), "URL"),
        ("default", of_length(39), "too short"),
        ("default", of_length(40), None),
        ("default", "x" * 26 + " y" * 26, None),
        ("default", "x" * 130 + " y" * 4, "long words"),
        ("default", "a b c d e " + "#" * 40, "few letters"),
        ("default", of_length(1001) + "\ufffd", None),
        ("default", of_length(900) + "\ufffd", "unreadable characters"),
        ("default", "\n".join(["the same line again"] * 6 + [f"line number {i}" for i in range(4)]), None),
        ("default", "\n".join(["the same line again"] * 7 + [f"line number {i}" for i in range(3)]), "repeated lines"),
        ("default,mor", of_length(401), "too long"),
    ],
)  # fmt: skip
def test_text_filters_at_their_borders(names: str, text: str, reason: str | None) -> None:
    assert verdict(names, text) == reason


LONG = "This is an answer that is long enough to pass, and it goes on for quite a few words more."


@pytest.mark.parametrize(
    ("roles", "ninety", "always"),
    [
        ("user assistant", None, None),
        ("system user assistant", None, None),
        ("user assistant user assistant", None, None),
        ("user", "structure", None),
        ("user assistant user", "structure", None),
        ("user user assistant", "structure", None),
        ("assistant user assistant", "structure", None),
        ("assistant", "structure", "structure"),
        ("system assistant", "structure", "structure"),
        ("user system assistant", "structure", "structure"),
        ("user tool", "structure", "structure"),
        ("", "empty", "empty"),
    ],
)
def test_structure_of_conversations(roles: str, ninety: str | None, always: str | None) -> None:
    document = Document(messages=tuple({"role": r, "content": LONG} for r in roles.split()), kind="chat")
    assert (verdict("90m", document), verdict("none", document)) == (ninety, always)


def test_an_empty_turn_breaks_the_structure() -> None:
    assert verdict("90m", chat(LONG, LONG, LONG, "")) == "structure"


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Yes.", None),
        ("!", "reply too short"),
        ("a" * 1199 + ".", None),
        ("a" * 1200 + ".", "reply too long"),
        ("And then", "reply ends badly"),
        ("```\nx = 1\n```", None),
        ('She said "yes."', None),
        ("**Done!**", None),
        ("He said (yes)", "reply ends badly"),
        ("one two three four. " * 2, None),
        ("one two three four. " * 3, "reply repeats itself"),
        ("a" * 94 + "é" * 5 + ".", None),
        ("a" * 93 + "é" * 6 + ".", "reply not ASCII"),
    ],
)
def test_short_chat_looks_at_every_reply(reply: str, reason: str | None) -> None:
    assert verdict("chat-short", chat("Well?", "Fine.", "So?", reply)) == reason
    assert verdict("chat-short", chat("Well?", reply, "So?", "Fine.")) == reason


def test_short_chat_lets_texts_pass_and_counts_turns() -> None:
    assert verdict("chat-short", "no end") is None
    assert verdict("chat-short", chat(*["Yes."] * 12)) is None
    assert verdict("chat-short", chat(*["Yes."] * 14)) == "many turns"


def test_pairs_need_a_prompt_and_two_different_replies() -> None:
    def pair(prompt: list[dict[str, str]], chosen: str, rejected: str) -> str | None:
        return verdict("none", parse_record({"prompt": prompt, "chosen": chosen, "rejected": rejected}, ""))

    user = {"role": "user", "content": "Well?"}
    assert pair([user], "Yes.", "No.") is None
    assert pair([user], "Yes.", "Yes.") == "equal replies"
    assert pair([user], "Yes.", "") == "structure"
    assert pair([user, {"role": "assistant", "content": "So."}], "Yes.", "No.") == "structure"
    assert pair([], "Yes.", "No.") == "structure"


def test_unknown_presets_are_refused_and_mor_brings_its_limits() -> None:
    with pytest.raises(UsageError, match="unknown filter '91m'"):
        preset("default,91m")
    assert preset("mor").distinct and preset("default,mor").most == 50_000
    assert not preset("90m").distinct


def test_proper_ends() -> None:
    assert all(map(ends_properly, ["a.", "a?!", "a…", "a.)", "a:", "`x`.\n", "```\na\n```\n"]))
    assert not any(map(ends_properly, ["", "a", "a,", "...a", "(a)", "`x`"]))


# Duplicates


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["River", "stone", "Äpfel", "12"]), min_size=1, max_size=8), st.randoms())
def test_case_and_white_space_do_not_make_a_new_document(words: list[str], rng: random.Random) -> None:
    other = "".join(rng.choice([w, w.upper(), w.lower()]) + rng.choice([" ", "\n", " \t "]) for w in words)
    assert digest(Document(text=" ".join(words))) == digest(Document(text=other))
    assert digest(Document(text=" ".join([*words, "more"]))) != digest(Document(text=other))


def test_who_said_it_matters() -> None:
    one = chat("a", "b")
    two = Document(messages=({"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}), kind="chat")
    assert len({digest(one), digest(two), digest(chat("ab", "")), digest(Document(text="a\nb"))}) == 4


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 60))
def test_signatures_estimate_the_jaccard_similarity_of_shingles(seed: int, changed: int) -> None:
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in rng.integers(0, 10**6, 200)]
    other = list(words)
    for place in rng.choice(200, changed, replace=False):
        other[place] = "changed"
    sets = [{tuple(w[i : i + 5]) for i in range(196)} for w in (words, other)]
    true = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    estimate = (signature(" ".join(words)) == signature(" ".join(other))).mean()
    assert abs(estimate - true) < 5 * max(0.01, np.sqrt(true * (1 - true) / 128))


def test_near_duplicates_above_the_threshold_are_found_and_different_texts_are_not() -> None:
    near = NearDuplicates(0.8)
    originals = texts(300, seed=1, words=120)
    for text in originals:
        near.add(signature(text))
    found = [signature(text + " One more.") in near for text in originals]
    assert sum(found) >= 295, "similarity 0.98"
    assert not any(signature(text) in near for text in texts(300, seed=2, words=120))
    halves = [a[: len(a) // 2] + b[len(b) // 2 :] for a, b in itertools.pairwise(originals)]
    assert not any(signature(text) in near for text in halves), "similarity 0.33"


def test_short_and_wordless_texts_are_compared_too() -> None:
    near = NearDuplicates(0.8)
    for text in ("Hello there!", "?!", "😀"):
        near.add(signature(text))
    assert all(signature(text) in near for text in ("hello there", "?!", "😀"))
    assert not any(signature(text) in near for text in ("Hello you", "!?", "😁", ""))


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_catch_what_is_clearly_above_the_threshold(threshold: float) -> None:
    bands, rows = bands_for(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - (threshold + 0.05) ** rows) ** bands > 0.94


@settings(max_examples=30)
@given(st.lists(st.sampled_from("abcdef"), min_size=0, max_size=30), st.integers(1, 14))
def test_gram_hashes_tell_runs_of_words_apart(words: list[str], length: int) -> None:
    hashes = gram_hashes(word_hashes(" ".join(words)), length)
    size = min(length, len(words))
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)] if size else []
    assert len(hashes) == len(runs) and len(set(hashes.tolist())) == len(set(runs))
    together = grams_of_lengths(word_hashes(" ".join(words)), [3, length])
    assert length > len(words) or together[length].tolist() == hashes.tolist()


# Held out


def test_the_held_out_share_is_right_and_larger_shares_hold_the_smaller() -> None:
    documents = [Document(text=f"document number {i}") for i in range(4000)]
    small = {d.text for d in documents if is_held_out(d, 0.05)}
    large = {d.text for d in documents if is_held_out(d, 0.2)}
    assert 140 < len(small) < 260 and 700 < len(large) < 900 and small < large
    assert not any(is_held_out(d, 0.0) for d in documents)


def test_pairs_with_one_prompt_stay_on_one_side() -> None:
    for i in range(40):
        record = {"prompt": f"question {i}", "chosen": "a", "rejected": "b"}
        sides = {is_held_out(parse_record(record | {"chosen": c}, ""), 0.5) for c in "cdefg"}
        assert len(sides) == 1


# Contamination


def contamination(tmp_path: Path, records: list[object]) -> Contamination:
    return Contamination.from_files([write_jsonl(tmp_path / "eval.jsonl", list(records))])


def near_copy(words: int) -> Callable[[str], str]:
    return lambda text: "Before it, " + " ".join(text.split()[:words]).upper() + ", and after."


def test_thirteen_words_in_a_row_are_contamination_twelve_are_not(tmp_path: Path) -> None:
    rng = random.Random(3)
    long = sentence(rng, 40)
    found = contamination(tmp_path, [{"id": "x", "context": long, "choices": ["a", "b"]}])
    assert found.touches(near_copy(13)(long)) and not found.touches(near_copy(12)(long))
    assert not found.touches("") and not found.touches(sentence(rng, 40))


def test_short_questions_are_found_as_a_whole_and_very_short_ones_ignored(tmp_path: Path) -> None:
    question = "which of these nine words is the right one"
    found = contamination(tmp_path, [{"context": f"Question: {question}?\nAnswer:"}, {"context": "what is it"}])
    assert found.touches(f"So, {question}, please") and not found.touches(f"{question[:-4]} two")
    assert not found.touches("what is it")
    assert not Contamination().touches(question)


def test_contamination_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file to decontaminate"):
        Contamination.from_files([tmp_path / "none.jsonl"])
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(InputError, match="line 1: not JSON"):
        Contamination.from_files([tmp_path / "bad.jsonl"])
    one, two = (contamination(tmp_path, [{"t": t}]) for t in texts(2, seed=4))
    assert one.fingerprint() != two.fingerprint() != Contamination().fingerprint() == ""
