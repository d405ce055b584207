"""A model's own tokenizer.json, checked line by line before the tokenizers library builds anything from it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from rlm_engine.errors import ModelError
from rlm_engine.tokenizer.byte_level import ByteLevelTokenizer, byte_characters

SIZE_LIMIT_BYTES = 64 * 2**20
MAX_TOKENS = 1_000_000
MAX_TOKEN_CHARACTERS = 1024

# Patterns of other well-known vocabularies. Any other one is refused: a hostile regular expression can run for ever.
_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")  # GPT-4 and Llama 3; Qwen 2
}


class FileTokenizer(ByteLevelTokenizer):
    """The byte-level BPE of a tokenizer.json.

    tokenizers 0.23 panics or aborts on many malformed files, which no ``except Exception`` catches. So the file is
    parsed and checked here, and only vocabulary, merges and a known way of cutting words reach the library.
    Taken: BPE over all 256 bytes without unknown token, prefix or suffix; pre-tokenizer ByteLevel (alone, or after
    Digits or a well-known Split). A normalizer is refused; truncation, padding and templates are not applied.
    All added tokens of the file count as special: only trusted text can produce them.
    """

    @classmethod
    def from_directory(cls, directory: Path, added_tokens: Sequence[str] = ()) -> FileTokenizer:
        """Read ``directory/tokenizer.json``; ModelError names the file and what is wrong with it."""
        path = directory / "tokenizer.json"
        data = _read_json(path)
        vocab, special = _vocabulary(data, path)
        merges = _merges(data["model"], vocab, path)
        pre_tokenizer = _pre_tokenizer(data, path)
        ignore_merges = bool(data["model"].get("ignore_merges", False))
        try:
            bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
            bpe.pre_tokenizer = pre_tokenizer
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust panic arrives as a BaseException
            raise ModelError(f"{path}: the tokenizers library refuses it ({error})") from None
        return cls(bpe, len(vocab) + len(special), special, added_tokens, str(path))


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of bounded size; devices and pipes are never waited for."""
    try:
        # O_NONBLOCK: opening a FIFO must not hang; the check is on what was opened, not on the name.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise ModelError(f"{path}: not a regular file")
        with os.fdopen(descriptor, "rb") as file:
            if status.st_size > SIZE_LIMIT_BYTES:
                raise ModelError(f"{path}: {status.st_size} bytes; a tokenizer has at most {SIZE_LIMIT_BYTES}")
            content = file.read(SIZE_LIMIT_BYTES)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ModelError(f"{path}: not valid JSON ({reason})") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return data


def _vocabulary(data: dict[str, Any], path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """The plain vocabulary and the special tokens; their ids together are 0..n-1, each once.

    Special tokens are kept from the library altogether, so that no typed text can come out as one of them.
    """
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise ModelError(f"{path}: model.type must be BPE")
    for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "dropout", "byte_fallback"):
        if model.get(key):
            raise ModelError(f"{path}: model.{key} must be off; only byte-level BPE is supported")
    if data.get("normalizer") is not None:
        raise ModelError(f"{path}: a normalizer would change what is typed; it must be null")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not 256 <= len(vocab) <= MAX_TOKENS:
        raise ModelError(f"{path}: model.vocab must be an object of 256 to {MAX_TOKENS} tokens")
    special = _special_tokens(data.get("added_tokens"), path)
    everything = {**vocab, **special}
    for text, token in special.items():
        if vocab.get(text, token) != token:
            raise ModelError(f"{path}: {text!r} has two ids, {vocab[text]} and {token}")
    alphabet = byte_characters()
    symbols = set(alphabet)
    for text, token in everything.items():
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < len(everything):
            wanted = f"ids must run from 0 to {len(everything) - 1}"
            raise ModelError(f"{path}: the id of {text[:40]!r} is {token!r}; {wanted}")
        if not text or len(text) > MAX_TOKEN_CHARACTERS:
            raise ModelError(f"{path}: token {token} is empty or longer than {MAX_TOKEN_CHARACTERS} characters")
        if text not in special and not symbols.issuperset(text):
            raise ModelError(f"{path}: token {text[:40]!r} is not written in byte-level characters")
    if len(set(everything.values())) != len(everything):
        raise ModelError(f"{path}: two tokens share an id")
    missing = next((c for c in alphabet if c not in vocab or c in special), None)
    if missing is not None:
        raise ModelError(f"{path}: byte {alphabet[missing]} has no token, so not every text could be encoded")
    return {t: i for t, i in vocab.items() if t not in special}, special


def _special_tokens(added: Any, path: Path) -> dict[str, int]:
    if added is None:
        return {}
    if not isinstance(added, list) or len(added) > 4096:
        raise ModelError(f"{path}: added_tokens must be a list of at most 4096")
    special: dict[str, Any] = {}
    for entry in added:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
            raise ModelError(f"{path}: every entry of added_tokens needs a content and an id")
        text = entry["content"]
        if text in special:
            raise ModelError(f"{path}: added token {text!r} is there twice")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ModelError(f"{path}: added token {text!r} is not text") from None
        special[text] = entry.get("id")  # its type and range are checked with all others
    return special


def _merges(model: dict[str, Any], vocab: dict[str, int], path: Path) -> list[tuple[str, str]]:
    """The merges as pairs of known tokens whose union is known too."""
    merges = model.get("merges")
    if not isinstance(merges, list) or len(merges) > MAX_TOKENS:
        raise ModelError(f"{path}: model.merges must be a list of at most {MAX_TOKENS}")
    pairs: list[tuple[str, str]] = []
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) for p in parts):
            raise ModelError(f"{path}: merge {i} must be a pair of tokens")
        left, right = parts
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelError(f"{path}: merge {i} ({left[:40]!r} + {right[:40]!r}) refers to an unknown token")
        pairs.append((left, right))
    return pairs


def _pre_tokenizer(data: dict[str, Any], path: Path) -> pre_tokenizers.PreTokenizer:
    """The way words are cut, rebuilt from the known ones."""
    outer = data.get("pre_tokenizer")
    kind = outer.get("type") if isinstance(outer, dict) else None
    steps = outer.get("pretokenizers") if isinstance(outer, dict) and kind == "Sequence" else [outer]
    if not isinstance(steps, list) or not 1 <= len(steps) <= 4 or not all(isinstance(s, dict) for s in steps):
        raise ModelError(f"{path}: pre_tokenizer must be ByteLevel, or a sequence that ends with it")
    built: list[Any] = []
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        if last and step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            built.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(step.get("use_regex", True))))
        elif not last and step.get("type") == "Digits":
            built.append(pre_tokenizers.Digits(individual_digits=bool(step.get("individual_digits", False))))
        elif not last and step.get("type") == "Split" and _known_split(step):
            built.append(pre_tokenizers.Split(tokenizers.Regex(step["pattern"]["Regex"]), behavior="isolated"))
        else:
            raise ModelError(f"{path}: step {i + 1} of pre_tokenizer ({step.get('type')!r}) is not supported")
    return built[0] if len(built) == 1 else pre_tokenizers.Sequence(built)


def _known_split(step: dict[str, Any]) -> bool:
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    return regex in _PATTERNS and step.get("behavior") == "Isolated" and not step.get("invert")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
