"""Take a picture of the real application with a real model, for the documentation.

python packaging/screenshots.py "Why is the sky blue?" --size 100x30 --out docs/chat.svg
python packaging/screenshots.py "Once upon a time" --mode continue --view heat --out docs/continue.svg
"""

from __future__ import annotations

import argparse
import asyncio
import re
from pathlib import Path

from rlm_chat.engine_client import EngineClient
from rlm_chat.session import Mode, Session, State
from rlm_chat.settings import DEPTH_VIEWS, Settings
from rlm_chat.tui.app import ChatApp
from rlm_chat.tui.screens.chat import ChatScreen

_COLUMN = 12.2  # the width of a character in the SVG files that Rich writes


async def take(options: argparse.Namespace) -> str:
    """Drive the application without a terminal and return its screen as SVG."""
    width, height = (int(n) for n in options.size.split("x"))
    mode = Mode(options.mode)
    models = {Mode.CHAT: options.model or "chat", Mode.CONTINUE: options.model or "base"}
    sampling = {"temperature": options.temperature, "seed": options.seed, "max_tokens": options.max_tokens}
    async with EngineClient() as engine:
        session = Session(engine, models, sampling=sampling, depth={"max_steps": options.max_depth})
        app = ChatApp(session, Settings(depth_view=options.view, theme=options.theme))
        async with app.run_test(size=(width, height)) as pilot:

            async def rest() -> None:
                await pilot.pause(0.2)
                while session.state not in (State.READY, State.FAILED):
                    await pilot.pause(0.1)
                if session.problem is not None:
                    raise SystemExit(f"screenshots: {session.problem}")
                await pilot.pause(0.3)

            await rest()
            if session.mode is not mode:
                await session.switch(mode)
                await rest()
            assert isinstance(app.screen, ChatScreen)
            for prompt in options.prompt:
                app.screen.prompt.insert(prompt)
                await pilot.press("enter")
                await rest()
            app.screen.prompt.cursor_blink = False
            await pilot.pause(0.1)
            return portable(app.export_screenshot())


def portable(svg: str) -> str:
    """Place every text after its leading blanks: some viewers squeeze runs of no-break spaces."""

    def place(match: re.Match[str]) -> str:
        start, x, middle, length, end, text = match.groups()
        blank = "&#160;"
        body = re.sub(f"^(?:{blank})+", "", text)
        leading = (len(text) - len(body)) // len(blank)
        body = re.sub(f"(?:{blank})+$", "", body)
        trailing = (len(text) - len(body)) // len(blank) - leading
        if not body:
            return ""
        left = float(x) + leading * _COLUMN
        wide = float(length) - (leading + trailing) * _COLUMN
        return f"{start}{left:.1f}{middle}{wide:.1f}{end}{body}</text>"

    return re.sub(r'(<text[^>]* x=")([\d.]+)("[^>]*textLength=")([\d.]+)("[^>]*>)([^<]*)</text>', place, svg)


def main() -> None:
    """Read the arguments, write the picture."""
    parser = argparse.ArgumentParser(description="Take a picture of rlm-chat with a real model.")
    parser.add_argument("prompt", nargs="+", help="what to send, one message after the other")
    parser.add_argument("--out", type=Path, default=Path("docs/chat.svg"))
    parser.add_argument("--size", default="100x30", help="columns x lines")
    parser.add_argument("--mode", choices=[str(m) for m in Mode], default="chat")
    parser.add_argument("--view", choices=DEPTH_VIEWS, default="ink")
    parser.add_argument("--theme", default="rlm-dark")
    parser.add_argument("--model", help="a bundled name or a directory")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--max-depth", type=int)
    options = parser.parse_args()
    picture = asyncio.run(take(options))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(picture, encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
