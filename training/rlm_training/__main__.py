"""`python -m rlm_training` is `rlm-train`."""

from rlm_training.cli import main

raise SystemExit(main())
