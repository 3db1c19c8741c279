"""Freed memory stays while a run lasts, and goes back when it ends."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from indistill_fx.system import allocator as memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")

SCRIPT = """
import os, resource
import torch
from indistill_fx.system.allocator import freed_memory_kept

def faults():
    "Page faults of ten blocks of 20 MB, one after the other."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(5_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.zeros(9_000_000)  # beyond glibc's moving threshold
start = resident()
with freed_memory_kept() as kept:
    faults()
    print(kept, faults(), resident() - start, end=" ")
print(resident() - start)
"""


def told(**environment: str) -> tuple[bool, int, int, int]:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    kept, *numbers = done.stdout.split()
    return (kept == "True", *map(int, numbers))


@glibc
def test_inside_no_page_is_taken_twice_and_afterwards_all_go_back():
    kept, faults, inside, after = told()
    assert kept
    assert faults < 100
    assert inside > 20e6
    assert after < 10e6


@glibc
def test_the_environments_own_wish_counts():
    kept, faults, inside, _ = told(MALLOC_MMAP_THRESHOLD_="100000")
    assert not kept
    assert faults > 10_000
    assert inside < 10e6


@pytest.mark.parametrize(("enabled", "library"), [(False, "glibc"), (True, "")])
def test_where_it_is_not_wanted_or_not_known_nothing_is_called(enabled, library, monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: (library, ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("no mallopt there"))
    with memory.freed_memory_kept(enabled=enabled) as kept:
        assert not kept
