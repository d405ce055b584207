"""``python -m rlm_chat`` is the command ``rlm-chat``."""

import sys

from rlm_chat.cli import main

if __name__ == "__main__":
    sys.exit(main())
