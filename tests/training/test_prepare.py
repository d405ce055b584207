"""Prepared folders: what is in them, whatever the workers, the order and the interruptions."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_files import conversation, snapshot, texts, write_jsonl

import rlm_training.prepare as prepare_module
from rlm_engine.chat import encode_chat_with_mask
from rlm_engine.errors import EngineError, InputError, UsageError
from rlm_engine.tokenizer.gpt2 import Gpt2Tokenizer
from rlm_training.cli import main
from rlm_training.corpus import Document
from rlm_training.data_report import make_report
from rlm_training.encoding import Encoder, Encoding, choose_encoding
from rlm_training.prepare import PrepareOptions, prepare
from rlm_training.shards import CHAT_FORMAT, CHAT_TOKENS, Concatenated, ShardWriter, load_sources, read_index, verify

END = 50256


@pytest.fixture(scope="module")
def tokenizer() -> Gpt2Tokenizer:
    return Gpt2Tokenizer(CHAT_TOKENS)


def stored(folder: Path, name: str, tokenizer: Any) -> list[str]:
    source = load_sources(folder)[name]
    bounds = source.documents
    return [tokenizer.decode(source.tokens[a:b].tolist()) for a, b in itertools.pairwise(bounds.tolist())]


def documents(folder: Path, name: str) -> list[int]:
    """Outcome counts of a source in the report: kept, held out."""
    found = json.loads((folder / "report.json").read_text())["sources"][name]
    return [found.get(o, {"documents": 0})["documents"] for o in ("kept", "held out")]


def test_texts_and_conversations_become_ids_masks_and_offsets(tmp_path: Path, tokenizer: Gpt2Tokenizer) -> None:
    plain = texts(3, seed=1)
    talk = conversation("What is it?", "It is a river.", "And that?", "That is a stone.")
    write_jsonl(tmp_path / "in/plain.jsonl", plain)
    write_jsonl(tmp_path / "in/mixed.jsonl.zst", [plain[0] + " Again.", talk])
    index = prepare([tmp_path / "in"], tmp_path / "out")
    sources = load_sources(tmp_path / "out")
    assert stored(tmp_path / "out", "plain", tokenizer) == plain
    assert sources["plain"].mask is None and sources["plain"].kind == "text"
    mixed = sources["mixed"]
    ids, mask = encode_chat_with_mask(talk["messages"], tokenizer, CHAT_FORMAT)
    start = int(mixed.documents[1])
    assert mixed.tokens[start:].tolist() == ids and ids[-1] == END
    assert mixed.mask is not None and mixed.mask[start:].tolist() == mask and not mixed.mask[:start].any()
    assert mixed.tokens[start - 1] == END and mixed.kind == "chat"
    assert index["sources"]["mixed"]["tokens"] == len(mixed.tokens) and index["vocab_size"] == 50259
    assert verify(tmp_path / "out") == 5


def test_workers_and_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_SMALL_BYTES", 0)
    everything = texts(700, seed=2, words=24)
    write_jsonl(tmp_path / "a.jsonl", everything[:400] + everything[:20])
    write_jsonl(tmp_path / "b.jsonl", everything[300:])
    options = PrepareOptions(near_duplicates=0.8, heldout=0.1, shard_tokens=4000)
    for workers in (1, 2):
        prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / f"out{workers}", options, workers=workers)
    assert snapshot(tmp_path / "out1") == snapshot(tmp_path / "out2")
    report = make_report(read_index(tmp_path / "out1"))
    assert report["sources"]["a"]["duplicate"]["documents"] == 20
    assert report["sources"]["b"]["duplicate"]["documents"] == 100, "also across sources"
    assert report["total"]["kept"]["documents"] + report["total"]["held out"]["documents"] == 700
    assert len(read_index(tmp_path / "out1")["sources"]["a"]["shards"]) > 1


def test_shards_are_bounded_and_read_as_one(tmp_path: Path, tokenizer: Gpt2Tokenizer) -> None:
    plain = texts(60, seed=3)
    write_jsonl(tmp_path / "plain.jsonl", plain)
    index = prepare([tmp_path / "plain.jsonl"], tmp_path / "out", PrepareOptions(shard_tokens=1000))
    shards = index["sources"]["plain"]["shards"]
    assert len(shards) > 3 and all(s["tokens"] <= 1000 for s in shards)
    assert stored(tmp_path / "out", "plain", tokenizer) == plain
    source = load_sources(tmp_path / "out")["plain"]
    whole = np.asarray(source.tokens)
    assert [source.tokens[i] for i in (0, 1500, -1)] == whole[[0, 1500, -1]].tolist()
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, len(whole) + 1, (100, 2)), axis=1):
        assert source.tokens[start:stop].tolist() == whole[start:stop].tolist()
    assert isinstance(source.tokens, Concatenated) and source.tokens.dtype == np.uint16


KILLED = """
import multiprocessing, os, signal
import rlm_training.prepare as preparation
from rlm_training.cli import main
from rlm_training.shards import ShardWriter

def add(self, ids, mask, counted=[0], write=ShardWriter.add):
    counted[0] += 1
    if counted[0] == 150:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, ids, mask)

if __name__ == "__main__":
    preparation._SMALL_BYTES = 0
    ShardWriter.add = add
    main({arguments})
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes the Linux way")
def test_a_run_killed_by_force_continues_to_the_same_bytes(tmp_path: Path) -> None:
    """kill -9 in the middle of a part; worker processes must not outlive their parent."""
    plain = texts(400, seed=4, words=24)
    write_jsonl(tmp_path / "a.jsonl", plain[:300] + plain[:20])
    write_jsonl(tmp_path / "b.jsonl", plain[200:])
    extra = ["--near-duplicates", "0.8", "--heldout", "0.05", "--shard-tokens", "2000"]
    command = ["prepare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), *extra]
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(arguments=[*command, "--out", str(tmp_path / "cut"), "--workers", "2"]))
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in ended.stdout.split()]
    assert len(workers) == 2
    before = read_index(tmp_path / "cut")
    assert before["unfinished"]["a"]["shards"] and list((tmp_path / "cut").glob("*.tmp")), "in the middle of a part"
    kept = {f: (tmp_path / "cut" / f).stat().st_mtime_ns for f in before["unfinished"]["a"]["shards"][0]["files"]}
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "an orphaned worker lives on"
        time.sleep(0.02)
    for out in ("cut", "whole"):
        assert main([*command, "--out", str(tmp_path / out)]) == 0
    assert all((tmp_path / "cut" / f).stat().st_mtime_ns == at for f, at in kept.items()), "finished parts are kept"
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("after", [1, 30, 75, 110])
def test_an_interrupted_run_leaves_no_debris_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    plain = texts(120, seed=5, words=24)
    write_jsonl(tmp_path / "a.jsonl", plain[:80] + plain[:5])
    write_jsonl(tmp_path / "b.jsonl", plain[60:])
    options = PrepareOptions(heldout=0.2, shard_tokens=500)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    written = 0
    add = ShardWriter.add

    def interrupted(self: ShardWriter, ids: np.ndarray, mask: np.ndarray) -> None:
        nonlocal written
        written += 1
        if written == after:
            raise KeyboardInterrupt
        add(self, ids, mask)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(paths, tmp_path / "cut", options)
    assert not list((tmp_path / "cut").rglob("*.tmp"))
    prepare(paths, tmp_path / "cut", options)
    prepare(paths, tmp_path / "whole", options)
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")


def test_held_out_documents_stay_the_same_when_files_and_lines_are_reordered(
    tmp_path: Path, tokenizer: Gpt2Tokenizer
) -> None:
    plain = texts(200, seed=6, words=24)
    sets = []
    for number in range(2):
        random.Random(number).shuffle(plain)
        write_jsonl(tmp_path / f"{number}/x.jsonl", plain[:100])
        write_jsonl(tmp_path / f"{number}/a{number}.jsonl", plain[100:] + plain[:3])
        prepare([tmp_path / str(number)], tmp_path / f"out{number}", PrepareOptions(heldout=0.2))
        held = tmp_path / f"out{number}/heldout"
        sets.append(sorted(t for name in load_sources(held) for t in stored(held, name, tokenizer)))
        train = {t for n in load_sources(held.parent) for t in stored(held.parent, n, tokenizer)}
        assert not train & set(sets[-1]) and len(train) + len(sets[-1]) == 200
    assert sets[0] == sets[1] and 20 < len(sets[0]) < 65


def test_sources_can_be_added_later_and_are_compared_with_those_there(tmp_path: Path) -> None:
    plain = texts(30, seed=7)
    write_jsonl(tmp_path / "a.jsonl", plain[:20])
    write_jsonl(tmp_path / "b.jsonl", plain[10:])
    prepare([tmp_path / "a.jsonl"], tmp_path / "out")
    first = snapshot(tmp_path / "out")
    prepare([tmp_path / "b.jsonl"], tmp_path / "out")
    second = snapshot(tmp_path / "out")
    assert documents(tmp_path / "out", "b") == [10, 0]
    assert all(second[f] == data for f, data in first.items() if f not in ("index.json", "report.json"))
    prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out")
    assert snapshot(tmp_path / "out") == second, "nothing is done twice"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"near_duplicates": 0.5}, r"other --near-duplicates \(0.0, now 0.5\)"),
        ({"heldout": 0.1}, "other --heldout"),
        ({"deduplicate": False}, "other --deduplicate"),
        ({"filters": (("*", "none"),)}, "source 'a' was prepared with filters default, now none"),
        ({"max_documents": (("a", 3),)}, "max-documents 0, now 3"),
        ({"chat_format": "90m"}, "another chat format"),
        ({"text_key": "body"}, "other --text-key"),
    ],
)
def test_other_options_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(5, seed=8))
    prepare([tmp_path / "a.jsonl"], tmp_path / "out")
    before = snapshot(tmp_path / "out")
    with pytest.raises(UsageError, match=message) as refused:
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", PrepareOptions(**change))
    assert "\n" not in str(refused.value) and snapshot(tmp_path / "out") == before


def test_another_file_of_the_same_name_is_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_jsonl(tmp_path / folder / "a.jsonl", texts(3, seed=len(folder) + ord(folder[0])))
    prepare([tmp_path / "one"], tmp_path / "out")
    with pytest.raises(UsageError, match=r"source 'a' of .* was made from another file"):
        prepare([tmp_path / "two"], tmp_path / "out")


def test_limits_and_filters_per_source(tmp_path: Path, tokenizer: Gpt2Tokenizer) -> None:
    plain = texts(40, seed=9)
    write_jsonl(tmp_path / "in/a.jsonl", [*plain[:10], "short"])
    write_jsonl(tmp_path / "in/b-code.jsonl", [*plain[10:20], "x"])
    write_jsonl(tmp_path / "in/c.jsonl", plain[20:])
    options = PrepareOptions(
        filters=(("*", "default"), ("*-code", "none")), max_documents=(("*", 11), ("a", 4)), max_tokens=(("c", 300),)
    )
    index = prepare([tmp_path / "in"], tmp_path / "out", options)
    assert stored(tmp_path / "out", "a", tokenizer) == plain[:4], "the first ones, in order"
    assert stored(tmp_path / "out", "b-code", tokenizer) == [*plain[10:20], "x"]
    kept = index["sources"]["c"]
    last = kept["tokens"] - len(tokenizer.encode(stored(tmp_path / "out", "c", tokenizer)[-1])) - 1
    assert last < 300 <= kept["tokens"]


def test_mor_deduplicates_even_when_duplicates_are_kept(tmp_path: Path) -> None:
    text = "This is a text of just the right length, which stands here twice."
    write_jsonl(tmp_path / "a.jsonl", [text, text.upper()])
    for names, kept in (("none", 2), ("mor", 1)):
        options = PrepareOptions(filters=(("*", names),), deduplicate=False)
        assert prepare([tmp_path / "a.jsonl"], tmp_path / names, options)["sources"]["a"]["documents"] == kept


def test_the_report_accounts_for_every_document(tmp_path: Path) -> None:
    plain = texts(20, seed=10)
    records = [*plain, plain[3], plain[4] + " Yes.", plain[5].upper(), "tiny", "", conversation("Hi", "Ho", "He")]
    write_jsonl(tmp_path / "a.jsonl", records)
    write_jsonl(tmp_path / "eval.jsonl", [{"context": plain[0]}, {"context": plain[1]}])
    options = PrepareOptions(near_duplicates=0.8, heldout=0.3, decontaminate=(tmp_path / "eval.jsonl",))
    index = prepare([tmp_path / "a.jsonl"], tmp_path / "out", options)
    report = json.loads((tmp_path / "out/report.json").read_text())
    outcomes = {name: counts["documents"] for name, counts in report["sources"]["a"].items()}
    held = outcomes.pop("held out")
    assert outcomes == {
        "read": 26, "kept": 18 - held, "duplicate": 2, "near-duplicate": 1, "contaminated": 2,
        "filtered: too short": 1, "filtered: empty": 1, "filtered: structure": 1,
    }  # fmt: skip
    read = report["sources"]["a"].pop("read")
    for key in ("documents", "characters", "tokens"):
        assert read[key] == sum(counts[key] for counts in report["sources"]["a"].values())
    assert read["characters"] == sum(len(r) for r in records[:-1]) + 8
    assert report["total"]["kept"]["tokens"] == index["sources"]["a"]["tokens"]


def test_an_empty_corpus_is_refused_with_the_report(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
    with pytest.raises(InputError, match=r"no document was left .*report\.json says why"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out")
    assert load_sources(tmp_path / "out") == {}


def damage_size(folder: Path) -> None:
    with (folder / "a-00000.bin").open("ab") as file:
        file.write(b"xx")


def damage_offsets(folder: Path) -> None:
    (folder / "a-00000.docs.npy").unlink()


def damage_index(folder: Path) -> None:
    (folder / "index.json").write_text('{"sources": 3}')


@pytest.mark.parametrize("damage", [damage_size, damage_offsets, damage_index])
def test_damaged_folders_are_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(3, seed=11))
    prepare([tmp_path / "a.jsonl"], tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(InputError, match="prepare it again"):
        load_sources(tmp_path / "out")


def test_verify_finds_a_flipped_bit_that_sizes_do_not_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(40, seed=12))
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", PrepareOptions(heldout=0.3))
    assert main(["prepare", "--verify", str(tmp_path / "out")]) == 0
    assert "4 files" in capsys.readouterr().out
    path = tmp_path / "out/heldout/a-00000.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    load_sources(tmp_path / "out/heldout")
    assert main(["prepare", "--verify", str(tmp_path / "out")]) == 4
    assert "heldout/a-00000.bin: damaged" in capsys.readouterr().err


def test_folders_of_the_first_version_can_be_read(tmp_path: Path) -> None:
    tokens = np.arange(10, dtype=np.uint16)
    tokens.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.docs.npy", np.array([0, 4, 10]))
    (tmp_path / "a.mask.bin").write_bytes(bytes([0, 1] * 5))
    entry = {"documents": 2, "tokens": 10, "sha256": "1f" * 32, "chat": True}
    (tmp_path / "index.json").write_text(json.dumps({"tokenizer": "gpt2", "sources": {"a": entry}}))
    source = load_sources(tmp_path)["a"]
    assert source.kind == "chat" and source.mask is not None and np.asarray(source.mask).tolist() == [0, 1] * 5
    assert np.asarray(source.tokens).tolist() == list(range(10)) and source.documents.tolist() == [0, 4, 10]
    with pytest.raises(InputError, match=r"a\.bin: damaged"):
        verify(tmp_path)
    with pytest.raises(UsageError, match="earlier version"):
        prepare([write_jsonl(tmp_path / "in/b.jsonl", texts(2, seed=1))], tmp_path)


def test_a_full_disk_keeps_finished_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(40, seed=13))
    options = PrepareOptions(shard_tokens=500)

    def full(self: ShardWriter) -> dict[str, Any]:
        if self._stem.endswith("2"):
            raise OSError(28, "No space left on device")
        return close(self)

    close = ShardWriter.close
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", full)
        with pytest.raises(EngineError, match=r"No space left on device.*run again to continue"):
            prepare([tmp_path / "a.jsonl"], tmp_path / "cut", options)
    assert len(read_index(tmp_path / "cut")["unfinished"]["a"]["shards"]) == 2
    prepare([tmp_path / "a.jsonl"], tmp_path / "cut", options)
    prepare([tmp_path / "a.jsonl"], tmp_path / "whole", options)
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")


def test_an_unreadable_record_is_named_from_a_worker_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_SMALL_BYTES", 0)
    path = write_jsonl(tmp_path / "a.jsonl", texts(3, seed=14))
    path.write_text(path.read_text() + "{broken\n")
    for workers in (1, 2):
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}, line 4: not JSON"):
            prepare([path], tmp_path / "out", workers=workers)


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare"], ["prepare", "x.txt"], ["prepare", "x.txt", "--out", "o", "--filter", "nice"],
        ["prepare", "x.txt", "--out", "o", "--max-documents", "many"],
        ["prepare", "x.txt", "--out", "o", "--heldout", "1.5"],
        ["prepare", "x.txt", "--out", "o", "--near-duplicates", "-1"],
        ["prepare", "x.txt", "--out", "o", "--tokenizer", "."],
        ["prepare", "x.txt", "--out", "o", "--chat-format", "theirs"],
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("text")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlm-train: ") and error.count("\n") == 1
    assert not Path("o/index.json").exists()


# Tokenizers and chat formats


def test_the_default_encoding_is_what_the_models_use(tokenizer: Gpt2Tokenizer) -> None:
    assert choose_encoding() == Encoding()
    assert Encoding().vocab_size == tokenizer.vocab_size == 50259 and Encoding().end_of_text == END
    assert Encoding().open().special == tokenizer.special


def test_a_trained_tokenizer_prepares_data_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rlm_engine.tokenizer.file import FileTokenizer

    corpus = write_jsonl(tmp_path / "a.jsonl", [*texts(30, seed=15), conversation("A question?", "The answer is so.")])
    arguments = ["tokenizer", str(corpus), "--out", str(tmp_path / "tok"), "--vocab-size", "400"]
    assert main(arguments) == 0 and "400 tokens" in capsys.readouterr().out
    assert main(["prepare", str(corpus), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tok")]) == 0
    index = read_index(tmp_path / "out")
    assert index["vocab_size"] == 400 and index["tokenizer"] == "file"
    own = FileTokenizer.from_directory(tmp_path / "out")
    source = load_sources(tmp_path / "out")["a"]
    ids = source.tokens[int(source.documents[-2]) :].tolist()
    shown = own.decode(ids, skip_special=False)
    assert shown == "<bos><user>A question?<assistant>The answer is so.<|endoftext|>"
    assert source.mask is not None and source.mask[-1] == 1, "ending is learned"
    (tmp_path / "tok/tokenizer.json").write_text((tmp_path / "tok/tokenizer.json").read_text() + " ")
    with pytest.raises(UsageError, match="another tokenizer"):
        prepare([corpus], tmp_path / "out", PrepareOptions(tokenizer=tmp_path / "tok"))


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    with_many = Encoding(added_tokens=tuple(f"<|{i}|>" for i in range(16_000)), vocab_size=66_257)
    ids, _ = Encoder(with_many).encode(Document(text="hello"))[0]
    assert ids.dtype == np.uint32
    writer = ShardWriter(tmp_path, "a-00000", np.uint32)
    writer.add(np.array([66_000, 1]), np.zeros(2))
    shard = writer.close()
    entry = {"kind": "text", "dtype": "uint32", "documents": 1, "tokens": 2, "shards": [shard]}
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "sources": {"a": entry}}))
    assert load_sources(tmp_path)["a"].tokens[0:2].tolist() == [66_000, 1]


def test_the_published_format_learns_to_end_the_text(tokenizer: Gpt2Tokenizer) -> None:
    encoder = Encoder(choose_encoding(chat_format="90m"))
    turns = tuple(conversation("Hi", "Ho")["messages"])
    ids, mask = encoder.encode(Document(messages=turns, kind="chat"))[0]
    assert tokenizer.decode(ids.tolist(), skip_special=False) == "<|user|>\nHi\n<|assistant|>\nHo\n<|endoftext|>"
    assert tokenizer.decode(ids[mask == 1].tolist(), skip_special=False) == "Ho\n<|endoftext|>"
    ids, mask = encoder.encode(Document(messages=turns[:1], kind="chat"))[0]
    assert ids[-1] == END and not mask.any()


def test_long_texts_are_cut_only_where_it_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    import rlm_training.encoding as encoding

    encoder = Encoder(Encoding())
    text = "\n\n".join(texts(8, seed=16)) + "\nline\n\n\n  indented\n" + "\n".join(texts(30, seed=17, words=12))
    whole = encoder.encode(Document(text=text))[0][0]
    monkeypatch.setattr(encoding, "_LONG_TEXT", 80)
    pieces: list[str] = []
    encode = encoder._tokenizer.encode

    def recorded(piece: str) -> list[int]:
        pieces.append(piece)
        return encode(piece)

    monkeypatch.setattr(encoder._tokenizer, "encode", recorded)
    assert encoder.encode(Document(text=text))[0][0].tolist() == whole.tolist() and len(pieces) > 10


def test_typed_marks_stay_text(tokenizer: Gpt2Tokenizer) -> None:
    ids, _ = Encoder(Encoding()).encode(Document(text="see <|endoftext|> and <|user|>"))[0]
    assert (ids[:-1] < END).all() and ids[-1] == END
    assert tokenizer.decode(ids.tolist()) == "see <|endoftext|> and <|user|>"
