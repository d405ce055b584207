"""The system clipboard through the system's own programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

_TIMEOUT_S = 2.0


def copy(text: str) -> str | None:
    """Put text on the clipboard; the name of the program that did it, or None when there is none that works."""
    for command in _commands():
        if shutil.which(command[0]) is None:
            continue
        try:
            # clip.exe wants UTF-16; the others read UTF-8.
            data = text.encode("utf-16" if command[0] == "clip" else "utf-8", "replace")
            done = subprocess.run(
                command,
                input=data,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return command[0]
    return None


def _commands() -> list[list[str]]:
    if sys.platform == "darwin":
        return [["pbcopy"]]
    if sys.platform == "win32":
        return [["clip"]]
    commands = []
    if os.environ.get("WAYLAND_DISPLAY"):
        commands.append(["wl-copy"])
    if os.environ.get("DISPLAY"):
        commands += [["xclip", "-selection", "clipboard"], ["xsel", "--clipboard", "--input"]]
    return commands
