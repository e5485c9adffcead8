"""What the machine is, as far as the bits of a run may depend on it."""

import functools
import hashlib
import os
import platform
import sys
from pathlib import Path


def usable_cpus() -> int:
    """How many cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def cpu() -> str:
    """Model and a hash of its instruction sets: kernels are chosen by them."""
    lines = []
    try:
        with Path("/proc/cpuinfo").open() as file:
            for line in file:
                if line.startswith(("model name", "flags", "Features")):
                    lines.append(line)
                elif not line.strip():
                    break  # the other cores are alike
    except OSError:
        return platform.processor()
    model = next(
        (x.split(":", 1)[1].strip() for x in lines if x[:5] == "model"), ""
    )
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()[:12]
    return f"{model} ({digest})"
