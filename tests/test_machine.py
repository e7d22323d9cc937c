"""What the process asks of its machine."""

import json
import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
import torch
from deltaproduct.machine import keep_freed_memory

kept = keep_freed_memory() if "keep" in sys.argv else None

def step():
    return [torch.full((size,), 1.0) for size in (1 << 20, 3 << 20, 12 << 20)]

for _ in range(8):  # aligned blocks split what was freed, until every size has found its place
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def page_faults(*arguments: str, **environment: str) -> tuple[bool | None, int]:
    """What `keep_freed_memory` said, and how many page faults three rounds of the same 64 MiB of tensors took."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=plain | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return tuple(json.loads(run.stdout))


@pytest.mark.slow("processes")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_used_again():
    """A loop that allocates what it has just freed takes no page of it from the system a second time."""
    _, faults = page_faults()
    kept, faults_kept = page_faults("keep")
    assert kept is True and faults > 100  # few, if the system gives huge pages; else some 10^4
    assert faults_kept < faults / 20


@pytest.mark.slow("processes")
def test_a_users_own_settings_stand():
    kept, faults = page_faults("keep", MALLOC_ARENA_MAX="2")
    assert kept is False and faults > 100
