import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lte_lightning.kernels.cpu import costs as module
from lte_lightning.kernels.cpu import ffn
from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.cpu.costs import Costs, costs
from lte_lightning.kernels.cpu.ffn import run_compiled, run_cpu
from lte_lightning.kernels.reference import run_reference

# Per weight and token: the way for few 3, for many 1, all of them by torch 0.5.
COSTS = Costs(few=(0.0, 3.0), many=(8.0, 1.0), dense=(8.0, 0.5))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache, which holds the compiled kernels and no costs, and the file of costs."""
    library()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module._costs.cache_clear()
    yield tmp_path / "lte-lightning" / "cpu_costs.json"
    module._costs.cache_clear()


@pytest.fixture
def given(monkeypatch):
    monkeypatch.setattr(ffn, "costs", lambda *_: COSTS)


def here(dtype=torch.float32):
    module._costs.cache_clear()  # as a new process would ask
    return costs(library(), dtype, ffn._compute)


def mask(*tokens_of_experts, tokens=20):
    return torch.stack([torch.arange(tokens) < count for count in tokens_of_experts], dim=1)


@pytest.mark.parametrize(
    ("mask_NE", "way"),
    [
        (mask(3, 3, 3), "few"),
        (mask(10, 10, 10), "many"),
        (mask(20, 20, 20), "dense"),
        (mask(20, 20, 0), "many"),  # an expert that nobody needs may hold anything
        (mask(6, 0, 0), "many"),  # the mean is over the experts that run
        (mask(0, 0, 0), "few"),
    ],
)
def test_the_cheapest_way(mask_NE, way, given, make_weights, assert_agrees, monkeypatch):
    assert COSTS.fastest(mask_NE) == way
    taken = []
    compute = ffn._compute
    monkeypatch.setattr(ffn, "_compute", lambda chosen, *rest: taken.append(chosen) or compute(chosen, *rest))
    weights = make_weights(3, 8, 12, gated=True, biases=True)
    x_ND = torch.randn(20, 12)
    assert_agrees(run_cpu(x_ND, mask_NE, weights), run_reference(x_ND, mask_NE, weights))
    assert taken == [way]


def test_few_tokens_do_not_ask(make_weights, monkeypatch):
    monkeypatch.setattr(ffn, "costs", lambda *_: pytest.fail("asked"))
    run_cpu(torch.randn(3, 12), torch.ones(3, 3, dtype=torch.bool), make_weights(3, 8, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_measured_once_and_read_afterwards(dtype, cache):
    first = here(dtype)
    assert first.few[1] > 0  # 16 tokens take longer than 4
    assert first.many[0] + first.many[1] > 0
    before = cache.stat().st_mtime_ns
    assert here(dtype) == first
    assert cache.stat().st_mtime_ns == before
    (types,) = json.loads(cache.read_text()).values()
    assert list(types) == [str(dtype).removeprefix("torch.")]


def test_types_and_numbers_of_threads_are_kept_side_by_side(cache):
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            here(torch.float32), here(torch.bfloat16)
    finally:
        torch.set_num_threads(threads)
    assert [list(types) for types in json.loads(cache.read_text()).values()] == [["float32", "bfloat16"]] * 2


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"a": 3}',
        b'{"a": {"float32": [[1, 2], [3, 4]]}}',
        b'{"a": {"float32": [[1, 2], [3, 4], [5, NaN]]}}',
        b'{"a": {"float32": [[1, 2], [3, 4], [5, -1]]}}',
        b'{"a": {"float32": "text"}}',
    ],
)
def test_a_damaged_file_is_measured_anew(damage, cache):
    cache.parent.mkdir()
    cache.write_bytes(damage)
    assert here() is not None
    assert here() == here()


def test_old_machines_are_forgotten(cache):
    cache.parent.mkdir()
    line = [[1.0, 1.0]] * 3
    cache.write_text(json.dumps({f"machine {i}": {"float32": line} for i in range(40)}))
    here()
    kept = list(json.loads(cache.read_text()))
    assert kept[:-1] == [f"machine {i}" for i in range(9, 40)]


def test_where_nothing_can_be_kept_the_kernels_choose(tmp_path, monkeypatch, cache, make_weights):
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a-file"))
    assert here() is None
    x_ND, mask_NE, weights = torch.randn(40, 12), torch.ones(40, 3, dtype=torch.bool), make_weights(3, 8, 12)
    assert run_cpu(x_ND, mask_NE, weights).equal(run_compiled(library(), x_ND, mask_NE, weights))


def test_nothing_else_changes_while_it_measures(cache, make_weights):
    x_ND, mask_NE, weights = torch.randn(8, 12), torch.ones(8, 3, dtype=torch.bool), make_weights(3, 8, 12)
    state = torch.get_rng_state()
    with FlopCounterMode(display=False) as flops, torch.inference_mode():
        run_cpu(x_ND, mask_NE, weights)
    assert cache.exists()
    assert torch.get_rng_state().equal(state)
    assert flops.get_total_flops() <= 3 * 2 * x_ND.numel() * 3 * 8


def test_several_processes_agree(cache, monkeypatch):
    monkeypatch.setenv("LTE_KERNELS", str(Path(library()._name).parent))  # they need not compile
    code = (
        "import torch\nfrom lte_lightning.kernels.cpu import ffn\n"
        "print(ffn.costs(ffn.library(), torch.float32, ffn._compute))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=100)[0] for process in processes}
    assert len(answers) == 1
    assert "Costs(few=" in answers.pop()
