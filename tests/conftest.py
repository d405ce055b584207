"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Waiting threads must not spin: with two cores a spinning pool slows everything else two- to eightfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

APP = Path(__file__).parent / "app"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with real processes, terminals and frame rates get two more chances: a stalled machine is no defect.

    What is wrong fails every time; a wrong number does so, too.
    """
    for item in items:
        jobs = item.path.name == "test_distributed.py"  # PyTorch's threads sometimes abort a process that is done
        if APP in item.path.parents or jobs or item.name == "test_interrupted_cleanly":
            item.add_marker(pytest.mark.flaky(reruns=2))
