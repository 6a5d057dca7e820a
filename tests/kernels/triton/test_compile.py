"""Every Triton kernel and configuration compiled for four chips, on a machine without any of them.

The launches are the backend's own: a driver that names the chip takes the place of the GPU's, and each launch compiles
what it would have run. That covers the tables, the specialisation of arguments, and all that the host does.
"""

import functools
import re
import subprocess
from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.triton import decode as triton_decode
from lte_lightning.kernels.triton import lists as triton_lists
from lte_lightning.kernels.triton import prefill as triton_prefill
from lte_lightning.kernels.triton import repair as triton_repair
from lte_lightning.kernels.triton import router as triton_router
from lte_lightning.kernels.triton import stream as triton_stream
from lte_lightning.kernels.triton.common import INTERPRETED
from lte_lightning.kernels.triton.ffn import run_triton

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
    pytest.mark.timeout(600),  # forty compilations, on a busy machine
]

# Shared memory that one block may have, in KiB, from the vendors' documents.
CHIPS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
KERNELS = {
    name
    for module in (triton_decode, triton_lists, triton_prefill, triton_repair, triton_router, triton_stream)
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
}
EXPERT_WEIGHTS = {"up_ptr", "gate_ptr", "down_ptr"}
E, S, D = 8, 32, 4096  # LLaMA-2-7B's expert; the number of experts makes no other code
TOKENS = (1, 2, 17, 129)  # one for each configuration
# In float32 the library computes gate and up of many tokens.
PREFILL = {"prefill_grouped_kernel", "prefill_union_kernel", "group_kernel", "choose_kernel"}


class Offline:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # a key of caches, and nothing else

    def get_current_stream(self, device):
        return 0


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("triton"))


@pytest.fixture
def launched(monkeypatch, cache):
    """`launched(chip, function, *args)` calls the function and returns what its launches compiled."""

    def run(chip, function, *args):
        monkeypatch.setattr(triton.knobs.cache, "dir", cache)
        monkeypatch.setattr(driver, "_active", Offline(CHIPS[chip][0]))
        kernels = []

        def launch(kernel, grid):
            return lambda *args, **kwargs: kernels.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

        monkeypatch.setattr(JITFunction, "__getitem__", launch, raising=False)
        function(*args)
        return kernels

    return run


def make_weights(dtype, gated, biases, activation, shape=(E, S, D)):
    empty = functools.partial(torch.empty, dtype=dtype)
    bias = (empty(shape[:2]), empty(shape[:2]) if gated else None, empty(shape[2])) if biases else ()
    return ExpertWeights(empty(shape), empty(shape), activation, empty(shape) if gated else None, *bias)


def run_ffn(N, weights, mask_NE=None):
    E, _, D = weights.up_ESD.shape
    mask_NE = torch.zeros((N, E), dtype=torch.uint8) if mask_NE is None else mask_NE
    few = triton_stream.run_stream if N == 1 else triton_decode.run_decode
    run = few if N <= triton_decode.MAX_TOKENS else triton_prefill.run_prefill
    run(torch.empty((N, D), dtype=weights.up_ESD.dtype), mask_NE, weights)


def run_router(N, dtype):
    # The operator behind `route_triton`, which refuses a CPU.
    weight_ED, threshold = torch.empty(E, D, dtype=dtype), torch.empty(())
    torch.ops.lte_lightning.triton_router(torch.empty(N, D, dtype=dtype), weight_ED, None, threshold)


def spills(kernel):
    """Bytes of stack per thread, where a spilled register goes."""
    if "amdgcn" in kernel.asm:
        counts = re.findall(r"\.(?:[vs]gpr_spill_count|private_segment_fixed_size): *(\d+)", kernel.asm["amdgcn"])
        assert len(counts) == 3
        return sum(map(int, counts))
    tool = triton.knobs.nvidia.cuobjdump.path
    binary = f"{triton.knobs.cache.dir}/spills.cubin"
    with open(binary, "wb") as file:
        file.write(kernel.asm["cubin"])
    usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:\d+ STACK:(\d+) .*LOCAL:(\d+)", usage)
    return int(found[1]) + int(found[2])


def reaches(sources, name, seen=frozenset()):
    """The kernel parameters from which an address was computed."""
    found = {source for source in sources[name] if isinstance(source, int)}
    for source in sources[name] - found - seen:
        found |= reaches(sources, source, seen | {name, source})
    return found


def loads(kernel):
    """(parameters, bytes) of each load from global memory, by the flow of addresses through the assembly."""
    sources, found, total = defaultdict(set), [], 0
    if "amdgcn" in kernel.asm:
        text = kernel.asm["llir"]
        for i in range(len(kernel.src.signature)):
            sources[f"%{i}"].add(i)  # arguments come first
        for name, operands in re.findall(
            r"(%\d+) = (?:tail call ptr.*make\.buffer\.rsrc|getelementptr|phi ptr|select)(.*)", text
        ):
            sources[name] |= set(re.findall(r"%\d+", operands))
        pattern = r"= (?:load|tail call) (<?[^@,\n]*?)(?:@llvm\S+buffer\.load\.\S+\(|, )ptr addrspace\([18]\) (%\d+)"
        widths = {"i8": 1, "i16": 2, "i32": 4, "float": 4, "half": 2, "bfloat": 2}
        for kind, name in re.findall(pattern, text):
            count, element = re.match(r"(?:<(\d+) x )?(\w+)", kind).groups()
            found.append((reaches(sources, name), int(count or 1) * widths[element]))
        total = len(re.findall(r"= load [^@\n]*addrspace\(1\)|= tail call .*buffer\.load", text))
    else:
        text = kernel.asm["ptx"]
        for operation, name, operands in re.findall(r"(?m)^\s*(?:@!?%p\d+ )?([\w.]+)\s+\{?\s*(%rd\d+)\b(.*)", text):
            if operation.startswith("ld.param"):
                sources[name].add(int(re.search(r"_param_(\d+)", operands)[1]))
            elif operation.startswith(("add", "sub", "mov", "mad", "selp", "cvta")):
                sources[name] |= set(re.findall(r"%rd\d+", operands))
        for count, bits, name in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b.*\[ *(%rd\d+)", text):
            found.append((reaches(sources, name), int(count or 1) * int(bits) // 8))
        for name, width in re.findall(r"cp\.async\.c[ag]\S*\s+\[[^\]]*\], \[ *(%rd\d+)[^\]]*\], (\w+)", text):
            found.append((reaches(sources, name), int(width, 0)))
        total = len(re.findall(r"\bld\.global|\bcp\.async\.c[ag]|\bcp\.async\.bulk", text))
    assert len(found) == total, "a load in a form that this test does not know"
    return found


def matrix_instructions(kernel):
    """The types that matrix units multiply and sum in this kernel; sums must be in float32."""
    if "amdgcn" in kernel.asm:
        return set(re.findall(r"v_mfma_(\w+?)_\d+x\d+x\d+_?(\w+)", kernel.asm["amdgcn"]))
    text = kernel.asm["ptx"]
    found = re.findall(r"mma(?:_async)?\.sync\.aligned\.m\d+n\d+k\d+(?:\.row\.col)?\.(f32)\.(\w+)", text)
    # tcgen05 has its types in a descriptor; its kind f16 is both 16-bit types.
    found += [("f32", kind) for kind in re.findall(r"tcgen05\.mma\S*kind::(\w+)", text)]
    assert len(found) == len(re.findall(r"\bmma(?:_async)?\.(?:sync|cta)", text)), "an unknown form of product"
    return set(found)


def check(kernels, chip):
    for kernel in kernels:
        name = f"{kernel.metadata.name} for {chip}"
        assert spills(kernel) == 0, name
        assert kernel.metadata.shared <= CHIPS[chip][1] * 1024, name
        parameters = [name for name, kind in kernel.src.signature.items() if kind != "constexpr"]
        weights = {i for i, parameter in enumerate(parameters) if parameter in EXPERT_WEIGHTS}
        widths = defaultdict(set)
        for reached, width in loads(kernel):
            # A load whose address the test cannot follow might be one of weights.
            for i in reached or weights:
                widths[i].add(width)
        assert {i: widths[i] for i in weights} == {i: {16} for i in weights}, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_and_configuration(chip, dtype, launched):
    weights = make_weights(dtype, gated=True, biases=False, activation="silu")
    kernels = [kernel for N in TOKENS for kernel in launched(chip, run_ffn, N, weights)]
    kernels += [kernel for N in TOKENS for kernel in launched(chip, run_router, N, dtype)]
    assert {kernel.metadata.name for kernel in kernels} == KERNELS - (PREFILL if dtype == torch.float32 else set())
    check(kernels, chip)
    # In float32 no TF32: only CDNA multiplies float32 itself in its matrix units.
    types = {("f32", "bf16"), ("f32", "f16")} if dtype == torch.bfloat16 else {("f32", "f32")}
    for kernel in kernels:
        assert matrix_instructions(kernel) <= types, kernel.metadata.name
        if dtype == torch.bfloat16 and kernel.metadata.name.startswith("prefill"):
            assert matrix_instructions(kernel), kernel.metadata.name


@pytest.mark.parametrize("chip", CHIPS)
def test_the_other_forms_of_the_kernels(chip, launched):
    # Plain with biases and an activation of more instructions, half precision, experts and widths of no round number.
    for dtype, activation, tokens in ((torch.float16, "gelu", (1, 2, 65, 129)), (torch.float32, "gelu_tanh", (2, 65))):
        weights = make_weights(dtype, gated=False, biases=True, activation=activation)
        check([kernel for N in tokens for kernel in launched(chip, run_ffn, N, weights)], chip)


def test_shapes_of_no_round_number_compile_too(launched):
    weights = make_weights(torch.bfloat16, gated=True, biases=True, activation="relu", shape=(5, 6, 20))
    for N in (2, 65):
        assert all(spills(kernel) == 0 for kernel in launched("sm_90", run_ffn, N, weights))


def test_neither_mask_nor_number_of_tokens_compiles_anew(launched):
    weights = make_weights(torch.bfloat16, gated=True, biases=False, activation="silu")

    def compiled(N, share):
        kernels = launched("sm_90", run_ffn, N, weights, (torch.rand(N, E) < share).to(torch.uint8))
        return [id(kernel) for kernel in kernels]

    for first, *others in ([1, 1], [2, 3, 16], [17, 33, 64], [65, 128], [129, 512, 513, 4096]):
        expected = compiled(first, 0.5)
        assert all(compiled(N, share) == expected for N in others for share in (0.0, 0.1, 1.0))


@pytest.mark.parametrize("N", [1, 7, 513])
def test_the_host_does_nothing_but_allocate_and_launch(N, launched):
    """What a CUDA graph can hold: no copy to the host, no shape from data; between launches only allocations."""
    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(str(func))
            return func(*args, **(kwargs or {}))

    weights = make_weights(torch.bfloat16, gated=True, biases=True, activation="silu")
    x_ND, mask_NE = torch.empty(N, D, dtype=torch.bfloat16), torch.zeros(N, E, dtype=torch.uint8)
    few = triton_stream.run_stream if N == 1 else triton_decode.run_decode
    run = few if N <= triton_decode.MAX_TOKENS else triton_prefill.run_prefill
    with Record():
        launched("sm_90", run, x_ND, mask_NE, weights)
    allocations = {"aten.empty.memory_format", "aten.empty_like.default", "aten.zeros.default"}
    # The library's product, on views: the down projection of many tokens.
    products = {"aten.addmm.default", "aten.view.default", "aten.t.default", "aten.permute.default"}
    assert called <= allocations | (products if N == 513 else set())


def test_a_spill_and_a_narrow_load_are_seen(launched, monkeypatch):
    config = triton_decode.HIDDEN[2]
    weights = make_weights(torch.bfloat16, gated=True, biases=False, activation="silu")
    monkeypatch.setitem(triton_decode.HIDDEN, 2, config | {"maxnreg": 32})
    kernels = launched("sm_80", run_ffn, 2, weights)
    assert [kernel.metadata.name for kernel in kernels if spills(kernel) > 0] == ["decode_hidden_kernel"]
    monkeypatch.setitem(triton_decode.HIDDEN, 2, config)
    for chip in ("sm_80", "gfx942"):
        narrow = make_weights(torch.bfloat16, gated=True, biases=False, activation="silu", shape=(E, S, D + 4))
        with pytest.raises(AssertionError, match=f"for {chip}"):
            check(launched(chip, run_ffn, 1, narrow), chip)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_a_cpu():
    weights = make_weights(torch.float32, gated=True, biases=False, activation="silu", shape=(5, 6, 20))
    with pytest.raises(ValueError, match="the triton backend needs a CUDA or ROCm device, and x_ND is on cpu"):
        run_triton(torch.randn(3, 20), torch.ones(3, 5, dtype=torch.bool), weights)
