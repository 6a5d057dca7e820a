import platform
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lte_lightning.kernels.cpu import ffn as cpu_ffn
from lte_lightning.kernels.cpu import processor
from lte_lightning.kernels.cpu.build import build
from lte_lightning.kernels.cpu.ffn import run_compiled, run_cpu
from lte_lightning.kernels.cpu.instructions import instruction_set, instruction_sets
from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.reference import run_reference


def case(make_weights, tokens=7, dtype=torch.float32):
    weights = make_weights(5, 24, 70, gated=True, biases=True, dtype=dtype)
    return torch.randn(tokens, 70).to(dtype), torch.rand(tokens, 5) > 0.5, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("instructions", instruction_sets())
def test_every_instruction_set_of_this_machine(instructions, dtype, make_weights, assert_agrees):
    levels = list(instruction_sets())
    if levels.index(instructions) > levels.index(instruction_set()):
        pytest.skip(f"this machine has no {instructions}")
    for tokens in (1, 30):
        x_ND, mask_NE, weights = case(make_weights, tokens, dtype)
        for way in ("few", "many"):
            actual = run_compiled(build(instructions), x_ND, mask_NE, weights, way)
            assert_agrees(actual, run_reference(x_ND, mask_NE, weights))


def test_torch_can_lower_the_instruction_set(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert instruction_set() == "avx2"
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert instruction_set() == "portable"


@pytest.mark.parametrize(
    ("features", "expected"), [("asimd i8mm asimddp", "neon_i8mm"), ("asimd asimddp", "neon_dotprod"), ("", "portable")]
)
def test_an_arm_processor_says_what_it_has(features, expected, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(processor, "cpu_facts", lambda: {"processor": "0", "Features": features})
    assert instruction_set() == expected
    assert list(instruction_sets()) == ["portable", "neon_dotprod", "neon_i8mm"]


@pytest.mark.parametrize(("present", "expected"), [(True, "neon_dotprod"), (False, "portable")])
def test_a_mac_says_what_it_has(present, expected, monkeypatch, tmp_path):
    lines = "hw.optional.arm.FEAT_DotProd: 1", "hw.optional.arm.FEAT_I8MM: 0", "hw.optional.arm.FEAT_BF16: 1"
    if present:
        (tmp_path / "sysctl").write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in lines))
        (tmp_path / "sysctl").chmod(0o755)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    processor._apple_flags.cache_clear()
    try:
        assert instruction_set() == expected
    finally:
        processor._apple_flags.cache_clear()


@pytest.mark.parametrize("way", ["few", "many"])
def test_threads_change_no_bit(way, make_weights):
    x_ND, mask_NE, weights = case(make_weights)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_compiled(build(instruction_set()), x_ND, mask_NE, weights, way))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


def test_more_tokens_than_are_taken_at_a_time(make_weights, assert_agrees):
    x_ND, mask_NE, weights = case(make_weights, tokens=2500)
    assert_agrees(run_cpu(x_ND, mask_NE, weights), run_reference(x_ND, mask_NE, weights))


def test_is_a_well_made_operator(make_weights):
    x_ND, mask_NE, w = case(make_weights)
    arguments = (x_ND, mask_NE, w.up_ESD, w.down_ESD, w.activation)
    optional = (w.gate_ESD, w.up_bias_ES, w.gate_bias_ES, w.down_bias_D)
    checks = ("test_schema", "test_faketensor")
    for tail in (optional, (None, None, None, None)):
        result = torch.library.opcheck(torch.ops.lte_lightning.cpu_ffn, (*arguments, *tail), test_utils=checks)
        assert set(result.values()) == {"SUCCESS"}


def broken_compiler(folder):
    path = folder / "broken-c++"
    path.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'cannot find iostream' >&2\nexit 1\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("compiler", ["none", "broken", "/no/such/c++"])
def test_without_a_compiler_it_says_so_once_and_computes(compiler, tmp_path, monkeypatch, make_weights, assert_agrees):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    broken = compiler == "broken"
    if compiler == "none":
        monkeypatch.delenv("CXX", raising=False)
    else:  # what CXX names is taken or nothing is
        monkeypatch.setenv("CXX", str(broken_compiler(tmp_path)) if broken else compiler)
        monkeypatch.setenv("PATH", "/bin:/usr/bin")
    cpu_ffn.library.cache_clear()
    x_ND, mask_NE, weights = case(make_weights)
    try:
        message = {"none": "no C\\+\\+ compiler found", "broken": "cannot find iostream"}.get(
            compiler, "which CXX names"
        )
        with pytest.warns(UserWarning, match=f"(?s){message}.*a small part of the speed-up remains.*CXX"):
            actual = run_cpu(x_ND, mask_NE, weights)
        assert_agrees(actual, run_reference(x_ND, mask_NE, weights))
        run_cpu(x_ND, mask_NE, weights)  # a second warning would be an error here
    finally:
        cpu_ffn.library.cache_clear()
    assert list((tmp_path / "lte-lightning").iterdir() if broken else []) == []


def test_torch_compile_traces_it_whole(make_weights, assert_agrees):
    x_ND, mask_NE, weights = case(make_weights)

    def ffn(x_ND, logits_NE):
        return run_cpu(x_ND * 2, logits_NE > 0, weights) + 1

    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager", dynamic=False)
    logits_NE = mask_NE.float() - 0.5
    with torch.no_grad():
        assert_agrees(compiled(x_ND, logits_NE), run_reference(x_ND * 2, mask_NE, weights) + 1)


def test_the_team_of_threads_is_torchs():
    """A second OpenMP would fight with torch's for the cores."""
    code = (
        "import torch; from lte_lightning.kernels.cpu.ffn import library; "
        "found = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rsplit('/')[-1]}; library(); "
        "print(found == {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rsplit('/')[-1]})"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.stdout.strip() == "True", result.stderr


def test_empty(make_weights):
    weights: ExpertWeights = make_weights(3, 8, 16)
    assert run_cpu(torch.zeros(0, 16), torch.zeros(0, 3, dtype=torch.bool), weights).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_that_do_not_fit(dtype, make_weights):
    weights: ExpertWeights = make_weights(3, 8, 16)
    with pytest.raises(ValueError, match=f"the input is {dtype} and the weights are torch.float32"):
        run_cpu(torch.zeros(2, 16, dtype=dtype), torch.ones(2, 3, dtype=torch.bool), weights)
    with pytest.raises(ValueError, match=f"gate_ESD is {dtype}, and up_ESD is torch.float32"):
        replace(weights, gate_ESD=weights.up_ESD.to(dtype))
