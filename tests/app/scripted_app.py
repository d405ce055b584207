"""``python tests/app/scripted_app.py [MODEL]``: the application as `rlm-chat` starts it, with the scripted worker."""

from __future__ import annotations

import sys
from pathlib import Path

import rlm_chat.engine_client
from rlm_chat.tui import run_tui

if __name__ == "__main__":
    script = str(Path(__file__).with_name("scripted_engine.py"))
    rlm_chat.engine_client.worker_command = lambda: [sys.executable, script]
    sys.exit(run_tui(*sys.argv[1:2]))
