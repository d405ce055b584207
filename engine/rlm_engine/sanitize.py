"""Text that did not come from this program, made safe for a terminal.

A language model can be talked into emitting escape sequences that recolour the screen, write the clipboard (OSC 52) or
fake a prompt, and so can file names and stored messages. Python's own str methods leave all of that in.
"""

from __future__ import annotations

import re

# C0 but newline and tab, DEL, C1, the bidirectional controls of "Trojan Source" (Boucher & Anderson 2021), and lone
# surrogates, which cannot be written as UTF-8. ESC and the C1 introducers are among them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_DROPPED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL_STRINGS = "]PX^_"  # after ESC: OSC, DCS, SOS, PM, APC; their C1 forms are the same letters + 0x40
_STRING_LIMIT = 4096


class PrintableFilter:
    """Removes everything a terminal would obey and keeps everything a person would read.

    Escape sequences (ECMA-48: CSI, OSC, DCS, SOS, PM, APC and the short ones, in their 7-bit and 8-bit forms) vanish
    whole; control characters except newline and tab, and bidirectional controls, vanish alone; half a surrogate pair
    becomes U+FFFD. The result is the same however the text is split.
    A sequence that breaks its own grammar ends there and the text goes on. A control string (OSC, ...) without its
    terminator ends at the end of its line, or after 4,096 characters, so that it cannot swallow a whole reply.
    """

    def __init__(self) -> None:
        self._state = "text"  # text, escape, intermediate, csi, string
        self._length = 0

    def push(self, text: str) -> str:
        """The printable part of the next piece."""
        if self._state == "text" and not _UNSAFE.search(text):
            return text
        return "".join([self._step(c) for c in text])

    def _step(self, c: str) -> str:
        state, code = self._state, ord(c)
        if c == "\x1b":
            self._state = "escape"  # inside a control string too: "\\" then completes its terminator
            return ""
        if c in "\x18\x1a\x9c":  # CAN, SUB and ST end any sequence
            self._state = "text"
            return ""
        if 0x80 <= code <= 0x9F:
            self._introduce(chr(code - 0x40))
            return ""
        if state == "string":
            return self._in_string(c)
        if state == "escape":
            if c in "[" + _CONTROL_STRINGS:
                self._introduce(c)
                return ""
            return self._in_sequence(c, code, 0x30, "intermediate")
        if state == "intermediate":
            return self._in_sequence(c, code, 0x30, "intermediate")
        if state == "csi":
            if 0x30 <= code <= 0x3F:
                return ""
            return self._in_sequence(c, code, 0x40, "csi")
        return _printable(c)

    def _introduce(self, c: str) -> None:
        self._length = 0
        self._state = "csi" if c == "[" else "string" if c in _CONTROL_STRINGS else "text"

    def _in_sequence(self, c: str, code: int, first_final: int, state: str) -> str:
        """One character of a sequence: intermediates go on, a final character ends it, anything else breaks it off."""
        if 0x20 <= code <= 0x2F:
            self._state = state
            return ""
        if code < 0x20 and c not in "\n\t":
            return ""  # terminals obey control characters inside a sequence; here they just vanish
        self._state = "text"
        return "" if first_final <= code <= 0x7E else _printable(c)

    def _in_string(self, c: str) -> str:
        self._length += 1
        if c == "\n" or self._length > _STRING_LIMIT:
            self._state = "text"
            return _printable(c)
        if c == "\x07":  # BEL ends an OSC
            self._state = "text"
        return ""


def printable(text: str) -> str:
    """A whole text without anything a terminal would obey: names, paths, error messages, stored replies."""
    return PrintableFilter().push(text)


def _printable(c: str) -> str:
    return "" if _DROPPED.match(c) else _SURROGATE.sub("\ufffd", c)
