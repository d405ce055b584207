"""The command line: output, JSON Lines, exit codes, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_act

from rlm_chat.cli import main
from rlm_engine.checkpoint import write_model_directory
from rlm_engine.config import ChatFormat

REFERENCE = Path(__file__).parent / "data" / "reference"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random act model with GPT-2's tokenizer and a chat format."""
    chat_format = ChatFormat(
        {"user": "<|user|>\n", "assistant": "<|assistant|>\n"}, {"user": "\n", "assistant": "<|endoftext|>"},
        ("<|endoftext|>",),
    )  # fmt: skip
    module = tiny_act(
        5, torch.float32, vocab_size=50_259, eos_token_id=50_256, tokenizer="gpt2", context_length=64,
        added_tokens=("<|user|>", "<|assistant|>"), chat_format=chat_format,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_model_directory(directory, module.config, module.state_dict())
    return str(directory)


class Piped(io.TextIOWrapper):
    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="utf-8")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())


def run(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as end:  # argparse
        return int(end.code or 0)


def test_same_seed_same_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for seed in ("1", "1", "2"):
        assert run("chat", "hello", "--model", model, "--seed", seed, "--max-tokens", "8") == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].endswith("\n")


def test_json_lines_and_plain_text_agree(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("complete", "Once upon", "--model", model, "--seed", "4", "--max-tokens", "9", "--temperature", "0.5")
    assert run(*common) == 0
    plain = capsys.readouterr().out
    assert run(*common, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [r["type"] for r in records] == ["token"] * 9 + ["summary"]
    assert set(records[0]) == {"type", "id", "text", "logprob", "depth", "steps", "halting", "alternatives"}
    from rlm_engine.sanitize import printable

    assert printable("".join(r["text"] for r in records[:-1])) + "\n" == plain
    assert records[-1]["stop_reason"] == "max_tokens" and records[-1]["seed"] == 4


def test_depth_options_reach_the_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("complete", "A", "--model", model, "--max-tokens", "5", "--json", "--max-depth", "2", "--greedy") == 0
    depths = [json.loads(line)["depth"] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert max(depths) <= 2


def test_piped_input_is_the_prompt(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", model, "--greedy", "--max-tokens", "4")
    assert run("complete", "two words", *options) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", Piped(b"two words\n"))
    assert run("complete", *options) == 0
    assert capsys.readouterr().out == expected


def test_score_reports_perplexity(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The cat sat on the mat.")
    assert run("score", str(file), "--model", model, "--json") == 0
    *tokens, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert summary["tokens"] == len(tokens) == 6
    assert summary["nats"] == pytest.approx(-sum(t["logprob"] for t in tokens), abs=1e-3)
    bits = summary["nats"] / 0.693147 / len(b" cat sat on the mat.")
    assert summary["bits_per_byte"] == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("chat", "hi", "--model", "/does/not/exist"), 3, "neither a bundled model"),
        (("chat", "hi", "--temperature", "-1"), 2, "temperature"),
        (("chat", "hi", "--temperature", "nan"), 2, "temperature"),
        (("chat", "hi", "--top-p", "0"), 2, "top p"),
        (("chat", "hi", "--top-k", "-3"), 2, "top k"),
        (("chat", "hi", "--min-p", "2"), 2, "min p"),
        (("chat", "hi", "--repetition-penalty", "0"), 2, "repetition penalty"),
        (("chat", "hi", "--max-tokens", "-1"), 2, "max tokens"),
        (("chat", "hi", "--max-depth", "0"), 2, "max depth"),
        (("chat", "hi", "--halt-threshold", "1.5"), 2, "halt threshold"),
        (("chat", "hi", "--stop", ""), 2, "stop"),
        (("chat", "hi", "--top-p", "x"), 2, "invalid float"),
        (("chat", "hi", "--backend", "jax"), 2, "invalid choice"),
        (("dance",), 2, "invalid choice"),
        (("chat", "  "), 4, "empty"),
        (("complete", ""), 4, "empty"),
        (("complete",), 4, "nothing to continue"),
        (("score", "/does/not/exist"), 4, "no such file"),
        (("score", "/dev/zero"), 4, "not a regular file"),
        (("chat", "hi", "--input", "x.jsonl"), 2, "either a prompt or --input"),
        (("complete", "hi", "--input", "x.jsonl"), 2, "either a prompt or --input"),
        (("chat", "--input", "x.jsonl", "--draft-depth", "2"), 2, "--draft-depth is for a single prompt"),
        (("chat", "hi", "--draft-depth", "0"), 2, "below the full depth, here 5; got 0"),
        (("complete", "hi", "--draft-depth", "5"), 2, "below the full depth, here 5; got 5"),
        (("chat", "hi", "--draft-depth", "3", "--max-depth", "3"), 2, "below the full depth, here 3; got 3"),
        (("chat", "--draft-depth", "99"), 2, "--draft-depth must be"),
        (("--backend", "onnx", "bench"), 2, "--backend is not an option of this command"),
        (("chat", "hi", "--batch", "2"), 2, "--batch is for the lines of --input"),
        (("--max-tokens", "3", "models"), 2, "--max-tokens is not an option"),
        (("--greedy", "score", "x.txt"), 2, "--greedy is not an option"),
        (("score", "x.txt", "--seed", "1"), 2, "unrecognized arguments: --seed"),
        (("--model", "chat", "export", "onnx", "base"), 2, "--model is not an option"),
        (("export", "onnx", "chat"), 2, "give --out"),
        ((), 2, "needs a terminal"),
        (("--json",), 2, "--json belongs to"),
    ],
)
def test_mistakes_get_one_line_and_their_exit_code(
    arguments: tuple[str, ...], code: int, says: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--model" not in arguments and arguments and arguments[0] in ("chat", "complete", "score"):
        arguments = (*arguments, "--model", model)
    assert run(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err and "Traceback" not in captured.err
    if "usage:" not in captured.err:
        assert captured.err.count("\n") == 1


def test_prompt_longer_than_the_context(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("complete", "word " * 100, "--model", model) == 4
    assert "context holds 64" in capsys.readouterr().err
    assert run("chat", "word " * 100, "--model", model) == 4


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"a\x00b", "text".encode("utf-16")])
def test_input_that_is_not_text(
    data: bytes, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Piped(data))
    assert run("complete", "--model", model) == 4
    assert "text" in capsys.readouterr().err


def test_max_tokens_zero_is_allowed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("complete", "A", "--model", model, "--max-tokens", "0", "--json") == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 0


def test_debug_shows_the_traceback(model: str) -> None:
    from rlm_engine import ModelError

    with pytest.raises(ModelError):
        main(["chat", "hi", "--model", "/does/not/exist", "--debug"])


def test_conversation_line_by_line(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hello", "", "and again"])

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert run("chat", "--model", model, "--max-tokens", "3", "--seed", "1") == 0
    assert len(capsys.readouterr().out.split("\n")) >= 3


@pytest.mark.parametrize("published", ["48m", "90m", "198m"])
def test_published_directory_is_recognised(published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory as published (config.json, model.safetensors) runs; the tiny ones have no tokenizer to read text."""
    shutil.copy(REFERENCE / f"{published}_config.json", tmp_path / "config.json")
    shutil.copy(REFERENCE / f"{published}_weights.safetensors", tmp_path / "model.safetensors")
    from rlm_engine import Sampling, load_model

    golden = json.loads((REFERENCE / f"{published}_golden.json").read_text())["greedy"][0]
    loaded = load_model(str(tmp_path))
    count = len(golden["output"]) - len(golden["prompt"])
    tokens = list(loaded.generate(golden["prompt"], Sampling(greedy=True, max_tokens=count)))
    assert golden["prompt"] + [t.id for t in tokens] == golden["output"]
    assert run("complete", "text", "--model", str(tmp_path)) == 4
    assert "no tokenizer" in capsys.readouterr().err


def test_every_line_of_a_file_is_answered(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "one"}, {"prompt": "two words"}, {"text": "three"}, "four"]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    options = ("--model", model, "--max-tokens", "4", "--seed", "5")
    assert run("complete", "--input", str(file), "--batch", "3", *options) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [r["index"] for r in records] == [0, 1, 2, 3]
    assert run("complete", "two words", "--json", "--model", model, "--max-tokens", "4", "--seed", "6") == 0
    single = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert records[1]["text"] == "".join(t["text"] for t in single[:-1])
    assert run("chat", "--input", str(file), *options) == 0
    assert capsys.readouterr().out.count("\n") == 4
    file.write_text('{"messages": 3}')
    assert run("chat", "--input", str(file), *options) == 4
    assert "line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "line", "says"),
    [
        ("chat", '{"prompt": " "}', "the prompt is empty"),
        ("chat", '""', "the prompt is empty"),
        ("complete", '{"prompt": ""}', "the text to continue is empty"),
        ("chat", "[1, 2]", 'needs {"prompt": "..."} or {"messages":'),
        ("chat", '{"messages": [1, 2]}', 'needs {"prompt": "..."} or {"messages":'),
        ("chat", '{"messages": []}', 'needs {"prompt": "..."} or {"messages":'),
        ("complete", '{"prompt": [1, 2]}', 'needs {"prompt": "..."}'),
        ("complete", '{"messages": [{"role": "user", "content": "a"}]}', 'needs {"prompt": "..."}'),
        ("chat", '{"messages": [{"role": "robot", "content": "a"}]}', "message 1: role must be"),
        ("chat", '{"messages": [{"role": "user", "content": 3}]}', "message 1: content must be a text"),
        ("chat", '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": ""}]}', "is empty"),
        pytest.param("chat", json.dumps("word " * 100), "too long", id="chat-long"),
        pytest.param("complete", json.dumps("word " * 100), "context holds 64", id="complete-long"),
        ("complete", '{"prompt": "\\ud800"}', "surrogate"),
        pytest.param("chat", "[" * 100_000, "not JSON", id="deep"),
        ("complete", "{", "not JSON"),
    ],
)
def test_a_line_that_is_refused_is_named(
    command: str, line: str, says: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n\n{line}\n{{"prompt": "fine, too"}}\n')
    assert run(command, "--input", str(file), "--model", model) == 4
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"rlm-chat: {file}, line 3: ") and says in captured.err


def test_line_breaks_of_unicode_do_not_end_a_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff{"prompt": "one\u2028two\x85"}\r\n"three"', encoding="utf-8", newline="")
    assert run("complete", "--input", str(file), "--model", model, "--max-tokens", "1") == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_system_message_is_put_before_conversations_that_have_none(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line answers as the same conversation with its system message written out."""
    file = tmp_path / "prompts.jsonl"
    options = ("chat", "--input", str(file), "--model", model, "--max-tokens", "6", "--seed", "3")
    pirate, king = ({"role": "system", "content": text} for text in ("Talk like a pirate.", "Be a king."))
    user = {"role": "user", "content": "hello"}
    outputs = []
    for lines, more in (
        (["hello", {"prompt": "hello"}, {"messages": [user]}, {"messages": [king, user]}], (pirate["content"],)),
        ([{"messages": [pirate, user]}] * 3 + [{"messages": [king, user]}], ()),
        (["hello"] * 4, ()),
    ):
        file.write_text("\n".join(map(json.dumps, lines)))
        assert run(*options, *(("--system", *more) if more else ())) == 0
        outputs.append([json.loads(line) for line in capsys.readouterr().out.split("\n") if line])
    assert outputs[0] == outputs[1] != outputs[2]


def test_drafting_does_not_change_the_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("complete", "A tree", "--model", model, "--greedy", "--max-tokens", "12")
    assert run(*common) == 0
    plain = capsys.readouterr().out
    assert run(*common, "--draft-depth", "1") == 0
    assert capsys.readouterr().out == plain


def test_version_and_help_import_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['rlm-chat', {!r}]\n"
        "from rlm_chat.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {{'numpy', 'torch', 'textual', 'tokenizers', 'onnxruntime', 'asyncio'}} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    for flag in ("--version", "--help"):
        done = subprocess.run([sys.executable, "-c", code.format(flag)], capture_output=True, check=True, timeout=30)
        assert done.stderr.decode().strip() == "[]"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_line(model: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "rlm_chat", "complete", "A", "--model", model, "--max-tokens", "2"],
            stdout=full, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr and done.stderr.count(b"\n") == 1


def test_reader_that_goes_away_is_quiet(model: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rlm_chat", "complete", "A tree", "--model", model, "--max-tokens", "50", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None and process.stdin is not None
    process.stdin.close()
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
