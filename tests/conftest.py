"""Shared fixtures."""

from __future__ import annotations

import os

# Waiting threads must not spin: with two cores a spinning pool slows everything else two- to eightfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
