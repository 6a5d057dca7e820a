"""FSDP2 over two gloo processes: shards are never taken for whole weights."""

import socket

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lte_lightning import LteConfig, convert, set_backend, set_mode
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.parts import find_layers
from lte_lightning.errors import UserError

IDS = torch.arange(12).view(2, 6) + 3
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {"llama": LlamaConfig(**SIZES), "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_inner=96, n_layer=2, n_head=4)}


def build(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    convert(model, LteConfig(16, "contiguous"), progress=False)
    for parameter in selector_parameters(model):
        nn.init.normal_(parameter)
    set_mode(model, "hard")
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def shard(model, by_layer=True):
    mesh = init_device_mesh("cpu", (2,))
    for layer in find_layers(model) if by_layer else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def local(model):
    """What this process holds of each parameter; the root's are whole after a forward pass."""
    return {name: p.to_local() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()}


def check_fsdp(family):
    expected = logits(build(family))
    for by_layer in (True, False):
        model = shard(build(family), by_layer)
        for backend in ("dense-mask", "cpu", "auto", "dense-mask"):
            before = {name: (p.clone(), p.stride()) for name, p in local(model).items()}
            set_backend(model, backend)
            for name, p in local(model).items():
                assert p.equal(before[name][0])
                assert p.stride() == before[name][1]
            torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
            model.reshard()
            torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        assert all(ffn.prepare(torch.zeros(1, 1, 32)).weights is None for ffn in expert_ffns(model).values())
    laid_out = build(family)
    set_backend(laid_out, "cpu")
    with pytest.raises(NotImplementedError, match="non-contiguous"):
        shard(laid_out)
    again = build(family)
    set_backend(again, "cpu")
    set_backend(again, "dense-mask")
    torch.testing.assert_close(logits(shard(again)), expected, rtol=1e-5, atol=1e-5)


def check_tensor_parallel(family):
    """A process that holds half of the neurons must not select among them as if they were all."""
    model = build(family)
    for ffn in expert_ffns(model).values():
        parallelize_module(ffn, init_device_mesh("cpu", (2,)), {"up": ColwiseParallel(), "gate": ColwiseParallel()})
    for backend in ("dense-mask", "cpu"):
        set_backend(model, backend)
        with pytest.raises(UserError, match="the up projection gave 48 of 96 neurons"):
            logits(model)


def work(rank, port, check, family):
    store = distributed.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        check(family)
    finally:
        distributed.destroy_process_group()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("check", "family"), [(check_fsdp, "llama"), (check_fsdp, "gpt2"), (check_tensor_parallel, "llama")]
)
def test_two_processes(check, family):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(work, (port, check, family), nprocs=2, start_method="fork")
