import platform
import subprocess
import sys

import pytest
import torch

from lte_lightning.kernels.cpu import pages
from lte_lightning.kernels.cpu.pages import HUGE, LINE, pack, room


def test_tensors_are_copied_one_behind_the_other():
    tensors = [torch.arange(5, dtype=torch.uint8), torch.randn(3, 7).bfloat16(), torch.empty(0), torch.randn(2, 33)]
    packed = list(pack(tensors, sum(map(room, tensors))))
    for copy, tensor in zip(packed, tensors, strict=True):
        assert copy.dtype == tensor.dtype
        assert copy.equal(tensor)
        assert copy.data_ptr() != tensor.data_ptr() or not tensor.numel()
    assert packed[0].data_ptr() % HUGE == 0
    assert packed[1].data_ptr() == packed[0].data_ptr() + LINE
    assert packed[3].data_ptr() == packed[1].data_ptr() + LINE


FAULTS = """
import ctypes, resource, runpy, sys

libc, size = ctypes.CDLL(None), 3 << 20
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        held = [libc.malloc(size) for _ in range(4)]
        for block in held:
            ctypes.memset(block, 1, size)
        for block in held:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_pages = runpy.run_path(sys.argv[1])["keep_pages"]
before = faults()
keep_pages()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other rules")
def test_freed_activations_keep_their_pages():
    run = subprocess.run([sys.executable, "-c", FAULTS, pages.__file__], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert before > 1000
    assert after < 100
