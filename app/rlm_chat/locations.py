"""Where this program keeps its files; nothing is created here."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import PlatformDirs

_DIRS = PlatformDirs("rlm-chat", appauthor=False)


def settings_file() -> Path:
    """The settings file: $RLM_CHAT_SETTINGS, or settings.toml in the user's configuration directory."""
    override = os.environ.get("RLM_CHAT_SETTINGS")
    return Path(override) if override else _DIRS.user_config_path / "settings.toml"


def data_directory() -> Path:
    """What must not be lost: the history."""
    return _DIRS.user_data_path


def log_directory() -> Path:
    """What may be deleted at any time: logs."""
    return _DIRS.user_log_path
