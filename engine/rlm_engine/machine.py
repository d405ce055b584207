"""The machine a measurement ran on: processor, cores, this process's memory, how fast memory can be read."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

STREAM_BYTES = 256 << 20  # several times the last-level cache of a desktop
_CHUNK_BYTES = 4 << 20


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once: a second thread on a core does not read memory faster."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, os.cpu_count() or 1)
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def processor_name() -> str:
    """The processor as its maker calls it, as far as the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown processor"


def load_average() -> float | None:
    """Programs that wanted a core during the last minute, on average; None where the system does not count them."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM now; where the system tells only the peak, the peak. None: unknown."""
    return _status_bytes("VmRSS") or _peak_from_rusage()


def peak_resident_bytes() -> int | None:
    """The most memory of this process that was in RAM at once; None: unknown."""
    return _status_bytes("VmHWM") or _peak_from_rusage()


def _status_bytes(field: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _peak_from_rusage() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def streaming_read_limit(size_bytes: int = STREAM_BYTES, repeats: int = 3) -> float:
    """Bytes per second at which all physical cores together read a large float32 array once, the best of `repeats`.

    The maximum of chunks, computed by numpy in one thread per core: one vector instruction per 16 to 64 bytes, so
    memory and not arithmetic is the limit (measured 30 GB/s per core where the machine's memory gives less to both).
    What it does not say: weights that stay in the last-level cache between two recurrences are read faster, so a
    model's share of this limit may exceed 1; and other programs that read memory take their part of it.
    """
    values = np.ones(max(1, size_bytes // 4), dtype=np.float32)  # written once: pages exist
    chunks = [values[start : start + _CHUNK_BYTES // 4] for start in range(0, len(values), _CHUNK_BYTES // 4)]
    best = float("inf")
    with ThreadPoolExecutor(physical_cores()) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(np.max, chunks))
            best = min(best, time.perf_counter() - started)
    return values.nbytes / best
