"""Memory of freed tensors is used again."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from rlm_training.allocator import keep_freed_memory, release_free_memory

if "keep" in sys.argv:
    assert keep_freed_memory()
torch.ones(16 << 20)  # 64 MiB, freed at once
if "release" in sys.argv:
    release_free_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(12 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (48 << 20) // 4096


def page_faults(*words: str) -> int:
    """Of the second of two large tensors, in a process of its own: the switch cannot be undone."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    assert page_faults() > PAGES // 2, "this C library needs no help"
    assert page_faults("keep") < PAGES // 64


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_kept_memory_can_be_given_back() -> None:
    assert page_faults("keep", "release") > PAGES // 2
