import platform
import subprocess
import sys

import pytest
import torch

from sepconv.ops.memory import mapped_anew, resource

# Three tensors of 28 MB at a time are more than glibc keeps by itself. The ninth field of its
# `struct mallinfo2` counts the free bytes that it holds.
BYTES_HELD = """
import ctypes, torch, sepconv
if {keep}:
    sepconv.keep_freed_memory()
tensors = [torch.ones(7_000_000) for _ in range(3)]
del tensors
class Info(ctypes.Structure):
    _fields_ = [(f"field_{{i}}", ctypes.c_size_t) for i in range(10)]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
print(mallinfo().field_8)
"""
TENSORS = 3 * 28_000_000


def bytes_held(root, keep: bool) -> int:
    command = [sys.executable, "-c", BYTES_HELD.format(keep=keep)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep memory")
def test_freed_memory_is_kept(pytestconfig):
    root = pytestconfig.rootpath
    assert bytes_held(root, keep=True) >= TENSORS > bytes_held(root, keep=False)


@pytest.mark.skipif(resource is None, reason="the system does not tell")
def test_what_is_mapped_anew_is_told():
    # Above 32 MB glibc maps each block by itself; in pages of 2 MB that is 32 faults.
    assert mapped_anew(lambda: torch.empty(2**24).fill_(1)) >= 32 * 4096
    held = torch.ones(2**20)
    assert mapped_anew(lambda: held.mul_(2)) < 2**20
