"""The published technical tokenizer (mor): character-level BPE over regular-expression words. It loses text.

Identical ids to the published program, from its vocab.json and merges.txt. What it loses, by design: all white space
but tabs; underscores and what follows them in a name; digits that touch letters; letters beyond ASCII; addresses.
`technical_training` makes a lossless successor.
"""

from __future__ import annotations

import heapq
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlm_engine.errors import InputError, ModelError

SPECIAL_TOKENS = (
    "<pad>", "<unk>", "<bos>", "<eos>", "<system>", "<user>", "<assistant>", "<|endoftext|>",
    "<|newline|>", "<|tab|>", "<|code|>", "<|/code|>", "<|math|>", "<|/math|>",
)  # fmt: skip
UNKNOWN, BOS, EOS = 1, 2, 3

# Content with an id among the special ones: typed text may produce these, they steer nothing.
_CONTENT = {"<unk>": "\ufffd", "<|newline|>": "\n", "<|tab|>": "\t"}
_CONTROL = frozenset(SPECIAL_TOKENS) - set(_CONTENT)

_SIZE_LIMIT_BYTES = 64 * 2**20
_CACHED_WORDS, _CACHED_LENGTH = 65_536, 64
_MERGE_LINES = 32  # a merge spread over more lines (newlines in code) is taken only where its union comes next

_CODE = re.compile(r"```[\s\S]*?```|`[^`]+`")
_URL = re.compile(r"https?://[!$-_a-z]+")
_LOCAL_PART = re.compile(r"\b[A-Za-z0-9._%+-]+\Z")
_LOCAL_CHARACTER = re.compile(r"[A-Za-z0-9._%+-]")
_DOMAIN = re.compile(r"[A-Za-z0-9.-]+\.[A-Z|a-z]{2,}\b")
_ROLES = re.compile(r"<\|(system|user|assistant)\|>|<\|endoftext\|>")
# In the published order: mail-like, address, code fence, inline code, number, word, one other character.
_NO_TAG = r"\b\w+@\w+\.\w+\b|https?://\S+|```[\s\S]*?```|`[^`]+`|\b\d+\.?\d*\b|\b[a-zA-Z]+(?:'[a-z]*)?|[^\w\s]"
_WORD = re.compile(r"<[^>]+>|" + _NO_TAG)
_WORD_WITHOUT_TAGS = re.compile(_NO_TAG)


class TechnicalTokenizer:
    """See the module. ``special`` holds what only trusted text can produce.

    The published program turns a typed `<|user|>` or `<pad>` into the special token; here only with
    ``allow_special=True``, otherwise it is spelled in plain pieces. Unknown characters, tabs and newlines have ids of
    the special range too (1, 9, 8) but are content.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]):
        """``merges`` in the order of the file; see `read_merges`."""
        self._ids = dict(vocabulary)
        self._texts = {i: text for text, i in vocabulary.items()}
        self._ranks: dict[tuple[str, str], list[int]] = {}
        for rank, pair in enumerate(merges):
            self._ranks.setdefault(pair, []).append(rank)
        self._cache: dict[tuple[str, bool], tuple[int, ...]] = {}

    @classmethod
    def from_directory(cls, directory: Path) -> TechnicalTokenizer:
        """Read vocab.json and merges.txt; ModelError names the file and what is wrong with it.

        tokenizer_config.json holds nothing that encoding needs, and token_frequencies.pkl is never opened.
        """
        path = directory / "vocab.json"
        try:
            vocabulary = json.loads(_read(path))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path}: not valid JSON ({error})") from None
        _check_vocabulary(vocabulary, path)
        return cls(vocabulary, read_merges(_read(directory / "merges.txt"), vocabulary))

    @property
    def vocab_size(self) -> int:
        """How many ids have a meaning."""
        return len(self._ids)

    @property
    def special(self) -> dict[str, int]:
        """Special tokens that steer a model, and their ids."""
        return {text: self._ids[text] for text in SPECIAL_TOKENS if text in _CONTROL}

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text, without `<bos>` and `<eos>`.

        ``allow_special``: as published, `<|user|>` and its like, and the special tokens' own texts, become special.
        Raises InputError when the text cannot be UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"character {error.start + 1} of the text is half a surrogate pair, not text; read the file as UTF-8"
            ) from None
        ids: list[int] = []
        for word in words(text, allow_special):
            ids.extend(self._word(word, allow_special))
        return ids

    def encode_published(self, text: str) -> list[int]:
        """What the published program gives by default: `<bos>`, the ids with special tokens allowed, `<eos>`."""
        return [BOS, *self.encode(text, allow_special=True), EOS]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """As published: pieces joined without any space; with ``skip_special`` tabs and unknowns vanish too."""
        texts = (self._texts.get(i, "<unk>") for i in ids)
        text = "".join(t for t in texts if not (skip_special and t in SPECIAL_TOKENS))
        return text.replace("<|tab|>", "\t").replace("<|newline|>", "\n")

    def decode_readable(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """For people: the `token_bytes` joined, and nothing left out but the special tokens."""
        special = set(self.special.values()) if skip_special else set()
        return b"".join(self.token_bytes(i) for i in ids if i not in special).decode("utf-8")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one id as a person should see it; empty for ids outside the vocabulary.

        The spaces are gone from the ids, so one is put before every piece that begins with a letter: words come
        apart where BPE cut them, but sentences can be read. Digits stay together: a wrong number would be worse.
        """
        text = self._texts.get(token)
        if text is None:
            return b""
        text = _CONTENT.get(text, text)
        return (" " + text if text[0].isalpha() else text).encode("utf-8")

    def _word(self, word: str, allow_special: bool) -> tuple[int, ...]:
        key = (word, allow_special)
        ids = self._cache.get(key)
        if ids is None:
            ids = tuple(self._pieces(word, allow_special))
            if len(word) <= _CACHED_LENGTH:
                if len(self._cache) >= _CACHED_WORDS:
                    self._cache.clear()
                self._cache[key] = ids
        return ids

    def _pieces(self, word: str, allow_special: bool) -> Iterator[int]:
        whole = word in self._ids and (allow_special or word not in _CONTROL)
        for piece in [word] if whole else merge_in_file_order(word, self._ranks):
            if allow_special or piece not in _CONTROL:
                yield self._ids.get(piece, UNKNOWN)
            else:  # merges learnt to spell it
                yield from (self._ids.get(character, UNKNOWN) for character in piece)


def normalize(text: str) -> str:
    """Line ends, tabs, NFKC; web and mail addresses outside code become `<URL>` and `<EMAIL>`."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "<|tab|>")
    text = unicodedata.normalize("NFKC", text)
    spans: list[str] = []

    def set_aside(match: re.Match[str]) -> str:
        spans.append(match.group())
        return f"<|code|>CODE_BLOCK_{len(spans) - 1}<|/code|>"

    text = _CODE.sub(set_aside, text)
    text = _without_mail(_URL.sub("<URL>", text))
    if not spans:
        return text
    # One pass over the marks would differ from the original when code itself spells a later mark.
    for number, span in enumerate(spans):
        text = text.replace(f"<|code|>CODE_BLOCK_{number}<|/code|>", span)
    return text


def words(text: str, allow_special: bool) -> Iterator[str]:
    """The pre-tokens; roles written `<|user|>` are `<user>` when special tokens are allowed."""
    text = normalize(text)
    if allow_special:
        text = _ROLES.sub(lambda match: f" <{match.group(1)}> " if match.group(1) else f" {match.group()} ", text)
    # Past the last ">" no tag can end: there the pattern goes without, or every "<" would look to the end of the text.
    last, position = text.rfind(">"), 0
    while position <= last:
        match = _WORD.search(text, position)
        if match is None:
            return
        yield match.group()
        position = match.end()
    for match in _WORD_WITHOUT_TAGS.finditer(text, position):
        yield match.group()


def _without_mail(text: str) -> str:
    """Replace what matches `\\b[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\\.[A-Z|a-z]{2,}\\b`, in linear time.

    The plain pattern tries every word start of "a.a.a.a" up to the end: quadratic in what a person may paste.
    """
    out: list[str] = []
    done = 0
    at = text.find("@")
    while at != -1:
        start = at
        while start > done and _LOCAL_CHARACTER.match(text, start - 1):
            start -= 1
        domain = _DOMAIN.match(text, at + 1)
        if domain is not None:
            # the leftmost word boundary in the run; text before `start` decides whether `start` itself is one
            while start < at and not _boundary(text, start):
                start += 1
        if domain is None or start >= at:
            at = text.find("@", at + 1)
            continue
        out.extend((text[done:start], "<EMAIL>"))
        done = domain.end()
        at = text.find("@", done)
    out.append(text[done:])
    return "".join(out)


def _boundary(text: str, position: int) -> bool:
    return _IS_BOUNDARY.match(text, position) is not None


_IS_BOUNDARY = re.compile(r"\b")


def merge_in_file_order(word: str, ranks: Mapping[tuple[str, str], Sequence[int]]) -> list[str]:
    """The pieces after every merge, in file order, was applied once over the whole word from left to right.

    ``ranks``: the places of a pair in the file, rising. The published loop tries all merges on each word; here a heap
    holds, for each neighbouring pair, its first place not yet passed. A merge that only becomes possible after its
    place was passed is not applied, unlike in usual BPE. O(n log n) for n characters.
    """
    pieces: list[str | None] = list(word)
    following = list(range(1, len(pieces) + 1))
    preceding = list(range(-1, len(pieces) - 1))
    heap: list[tuple[int, int, str, str]] = []

    def push(left: int, after: int) -> None:
        right = following[left]
        if left < 0 or right >= len(pieces):
            return
        a, b = pieces[left], pieces[right]
        assert a is not None and b is not None
        for rank in ranks.get((a, b), ()):
            if rank > after:
                heapq.heappush(heap, (rank, left, a, b))
                return

    for i in range(len(pieces) - 1):
        push(i, -1)
    while heap:
        rank, left, a, b = heapq.heappop(heap)
        right = following[left]
        if pieces[left] != a or right >= len(pieces) or pieces[right] != b:
            continue  # one of the two was merged meanwhile
        pieces[left], pieces[right] = a + b, None
        following[left] = following[right]
        if following[left] < len(pieces):
            preceding[following[left]] = left
        push(left, rank)
        if preceding[left] >= 0:
            push(preceding[left], rank)
    return [piece for piece in pieces if piece is not None]


def read_merges(text: str, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges of a merges.txt, those whose parts hold spaces or newlines included.

    The file has `left right` per line, so such a merge is ambiguous or spread over lines; read naively it makes the
    published program fail with IndexError on some words. Training numbered each union as it was found, so the
    vocabulary tells which split was meant. A line that fits nothing is left out.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    texts = {i: piece for piece, i in vocabulary.items()}
    expected = min((i for i, piece in texts.items() if len(piece) > 1 and piece not in SPECIAL_TOKENS), default=0)
    longest = max(map(len, vocabulary), default=0)
    merges: list[tuple[str, str]] = []
    i = 0
    while i < len(lines):
        wanted = texts.get(expected, "")
        pair, used = _next_union(lines, i, vocabulary, wanted) or _repeated_union(lines, i, vocabulary, longest)
        if pair is not None:
            merges.append(pair)
            expected += pair[0] + pair[1] == wanted
        i += used
    return merges


def _next_union(
    lines: Sequence[str], i: int, vocabulary: Mapping[str, int], wanted: str
) -> tuple[tuple[str, str], int] | None:
    """The merge at line i that makes `wanted`, and how many lines it takes; None if there is none."""
    joined, used = lines[i], 1
    while len(joined) <= len(wanted) and i + used < len(lines):
        joined, used = joined + "\n" + lines[i + used], used + 1
    if len(joined) == len(wanted) + 1:
        for left, right in _splits(joined):
            if left + right == wanted and left in vocabulary and right in vocabulary:
                return (left, right), used
    return None


def _repeated_union(
    lines: Sequence[str], i: int, vocabulary: Mapping[str, int], longest: int
) -> tuple[tuple[str, str] | None, int]:
    """The merge at line i whose union has its number already; else the plain two parts, else None."""
    joined = lines[i]
    for used in range(1, min(_MERGE_LINES, len(lines) - i) + 1):
        if used > 1:
            joined += "\n" + lines[i + used - 1]
        if len(joined) > longest + 1:
            break
        for left, right in _splits(joined):
            if left in vocabulary and right in vocabulary and left + right in vocabulary:
                return (left, right), used
    plain = lines[i].split(" ")
    return ((plain[0], plain[1]) if len(plain) == 2 and all(plain) else None), 1


def _splits(joined: str) -> Iterator[tuple[str, str]]:
    for place, character in enumerate(joined):
        if character == " " and 0 < place < len(joined) - 1:
            yield joined[:place], joined[place + 1 :]


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise ModelError(f"{path}: missing, or not a regular file; the technical tokenizer needs it")
        if path.stat().st_size > _SIZE_LIMIT_BYTES:
            raise ModelError(f"{path}: larger than {_SIZE_LIMIT_BYTES} bytes, no tokenizer file")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path}: not UTF-8 text") from None


def _check_vocabulary(vocabulary: object, path: Path) -> None:
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ModelError(f"{path}: must map tokens to ids")
    for text, token in vocabulary.items():
        if not text or not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < len(vocabulary):
            raise ModelError(f"{path}: the id of {text[:40]!r} is {token!r}; ids must be 0 to {len(vocabulary) - 1}")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise ModelError(f"{path}: two tokens share an id")
    for token, text in enumerate(SPECIAL_TOKENS):
        if vocabulary.get(text) != token:
            raise ModelError(f"{path}: the special token {text} must have id {token}, not {vocabulary.get(text)}")
