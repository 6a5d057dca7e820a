"""Whatever the kernels cannot see is computed by the modules: adapters, hooks, wrappers, other tensors and modules."""

import copy
import functools
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from transformers import activations

from lte_lightning import LteConfig, convert, from_pretrained, restore, save_pretrained, set_backend, set_mode
from lte_lightning.core.model.convert import group_experts
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.parts import UnsupportedModelError
from lte_lightning.core.model.quantize import quantize
from lte_lightning.errors import UserError
from lte_lightning.kernels import dispatch

PROJECTIONS = ("up", "gate", "down")


@pytest.fixture
def sparse(build, scatter):
    """`sparse(family)`: in hard mode on the kernels, about half of its experts off."""

    def make(family="llama", head="lm"):
        model = scatter(convert(build(family, head, 0.0), LteConfig(expert_size=16), progress=False))
        set_mode(model.requires_grad_(False), "hard")
        set_backend(model)
        return model

    return make


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_said", set())
    caplog.set_level(logging.WARNING, "lte_lightning")
    return lambda: caplog.messages


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def masked(model, batch):
    """What dense-mask computes, on the same modules."""
    ffns = list(expert_ffns(model).values())
    backends = [ffn.backend for ffn in ffns]
    for ffn in ffns:
        ffn.backend = "dense-mask"
    out = logits(model, batch)
    for ffn, backend in zip(ffns, backends, strict=True):
        ffn.backend = backend
    return out


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def runs_sparsely(model):
    with torch.no_grad():
        return [ffn.prepare(torch.randn(1, 2, ffn.width)).weights is not None for ffn in expert_ffns(model).values()]


def targets(model, names=PROJECTIONS):
    return [
        f"{path}.{name}" for path, ffn in expert_ffns(model).items() for name in names if getattr(ffn, name) is not None
    ]


def add_lora(model, modules, **options):
    """Adapters that do something: B is not zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False, **options)
    peft.inject_adapter_in_model(config, model)
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("names", [("up",), ("gate",), ("down",), PROJECTIONS], ids="-".join)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "phi3", "t5-gated"])
def test_lora_on_projections(family, names, sparse, batch, said):
    model = sparse(family, "seq2seq" if family == "t5-gated" else "classification")
    names = targets(model, names)
    if not names:
        pytest.skip("a plain FFN has no gate")
    if family == "t5-gated":
        batch = batch | {"decoder_input_ids": batch["input_ids"]}
    plain = logits(model, batch)
    assert all(runs_sparsely(model))
    adapters = add_lora(model, names, fan_in_fan_out=family == "gpt2")
    adapted = logits(model, batch)
    assert (adapted - plain).abs().max() > 1e-3
    close(adapted, masked(model, batch))
    assert len(said()) == len({name.rpartition(".")[2] for name in names[:1]})
    assert "projection is a Linear of peft.tuners.lora.layer" in said()[0]
    for adapter in adapters:  # merged, it is the same function in the base layer's own weights
        adapter.merge()
    close(logits(model, batch), adapted, 1e-4)
    close(masked(model, batch), adapted, 1e-4)
    for adapter in adapters:
        adapter.unmerge()
    close(logits(model, batch), adapted, 1e-4)
    for adapter in adapters:
        adapter.enable_adapters(False)
    close(logits(model, batch), plain)


# peft 0.21 asks transformers 5.23 by a name that it renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_merged_and_unloaded_the_kernels_compute_again(sparse, batch):
    peft = pytest.importorskip("peft")
    model = sparse()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=list(PROJECTIONS), init_lora_weights=False)
    ).eval()
    adapted = logits(wrapped, batch)
    close(adapted, masked(wrapped, batch))
    assert not any(runs_sparsely(model))
    whole = wrapped.merge_and_unload()
    close(logits(whole, batch), adapted, 1e-4)
    set_backend(whole)
    assert all(runs_sparsely(whole))
    close(logits(whole, batch), adapted, 1e-4)


def test_a_backend_chosen_after_the_adapters(sparse, batch):
    model = sparse()
    set_backend(model, "dense-mask")
    add_lora(model, list(PROJECTIONS))
    adapted = logits(model, batch)
    set_backend(model)
    close(logits(model, batch), adapted, 1e-6)
    set_backend(model, "dense-mask")
    assert logits(model, batch).equal(adapted)


def test_adapters_train_and_evaluate_as_one(sparse, batch):
    """The issue's example: trained to a lower loss, evaluated as if nothing had been learnt."""
    model = sparse()
    add_lora(model, list(PROJECTIONS))
    ids_BT = batch["input_ids"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(5):
        loss = model(ids_BT, labels=ids_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        sparse_loss = model(ids_BT, labels=ids_BT).loss
    assert sparse_loss < loss
    close(sparse_loss, model(ids_BT, labels=ids_BT).loss.detach())


def test_lora_on_attention_keeps_the_kernels(sparse, batch, said):
    model = sparse()
    plain = logits(model, batch)
    add_lora(model, ["q_proj", "v_proj"])
    assert (logits(model, batch) - plain).abs().max() > 1e-3
    assert all(runs_sparsely(model))
    assert said() == []


def test_restoring_puts_the_weight_below_an_adapter_back(sparse, build, batch):
    model = sparse()
    expected = {name: p.stride() for name, p in build("llama", "lm").named_parameters()}
    add_lora(model, list(PROJECTIONS))
    restore(model)
    found = {name.replace(".base_layer", ""): p.stride() for name, p in model.named_parameters() if "lora" not in name}
    assert found == expected


def double(module, args, output):
    return 2 * output


def half(module, args):
    return (args[0] / 2,)


def own_forward(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Odd(torch.Tensor):
    """A tensor that is not what its storage says."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs)
        x, weight, *bias = (a.as_subclass(torch.Tensor) if isinstance(a, torch.Tensor) else a for a in args)
        return func(x, 2 * weight, *bias)


def subclassed(module):
    module.__class__ = Doubled


def odd_weight(module):
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Odd), requires_grad=False)


def offloaded(module):
    """What accelerate does with weights that do not fit: they are on the meta device until the module is called."""
    accelerate = pytest.importorskip("accelerate")
    weights = {name: (1.5 * p).clone() for name, p in module.named_parameters()}
    hook = accelerate.hooks.AlignDevicesHook("cpu", offload=True, weights_map=weights)
    accelerate.hooks.add_hook_to_module(module, hook)
    assert module.weight.is_meta


def swapped(module):
    """Another weight of the same class, type and shape in the same parameter, as `load_state_dict(assign=True)`."""
    module.weight = nn.Parameter(1.5 * module.weight.detach().contiguous(), requires_grad=False)


CHANGES = {
    "forward hook": lambda module: module.register_forward_hook(double),
    "forward hook with kwargs": lambda module: module.register_forward_hook(
        lambda m, args, kwargs, out: 2 * out, with_kwargs=True
    ),
    "pre-hook": lambda module: module.register_forward_pre_hook(half),
    "own forward": own_forward,
    "subclass": subclassed,
    "tensor subclass": odd_weight,
    "parametrised": lambda module: parametrizations.spectral_norm(module.train(), n_power_iterations=3).eval(),
    "pruned": lambda module: prune.custom_from_mask(module, "weight", torch.rand(module.weight.shape) > 0.5),
    "offloaded": offloaded,
    "swapped": swapped,
}


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_the_first_pass_are_noticed(change, name, sparse, batch, said):
    model = sparse()
    plain = logits(model, batch)
    for ffn in expert_ffns(model).values():
        CHANGES[change](getattr(ffn, name))
    changed = logits(model, batch)
    assert (changed - plain).abs().max() > 1e-3
    close(changed, masked(model, batch))
    if change != "swapped":
        assert len(said()) == 1
        assert f"its {name} projection" in said()[0]


def test_a_hook_that_is_removed_gives_the_kernels_back(sparse, batch, said):
    model = sparse()
    plain = logits(model, batch)
    handles = [ffn.up.register_forward_hook(double) for ffn in expert_ffns(model).values()]
    assert not logits(model, batch).allclose(plain)
    for handle in handles:
        handle.remove()
    assert logits(model, batch).equal(plain)
    assert all(runs_sparsely(model))


def test_a_hook_sees_what_passes(sparse, batch):
    model, seen = sparse(), []
    for ffn in expert_ffns(model).values():
        ffn.down.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    logits(model, batch)
    assert seen == [96, 96]


def test_global_hooks(sparse, batch, said):
    model, seen = sparse(), []
    plain = logits(model, batch)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(module) if isinstance(module, nn.Linear) else None
    )
    try:
        close(logits(model, batch), plain)
    finally:
        handle.remove()
    assert {id(ffn.down) for ffn in expert_ffns(model).values()} <= set(map(id, seen))
    assert "hooks are registered for every module's forward" in said()[0]
    assert all(runs_sparsely(model))


@pytest.mark.parametrize("part", ["activation", "dropout"])
def test_hooks_between_the_projections(part, sparse, batch, said):
    model = sparse("t5-gated", "seq2seq")
    batch = batch | {"decoder_input_ids": batch["input_ids"]}
    plain = logits(model, batch)
    for ffn in expert_ffns(model).values():
        getattr(ffn, part).register_forward_hook(double)
    changed = logits(model, batch)
    assert (changed - plain).abs().max() > 1e-3
    close(changed, masked(model, batch))
    assert f"its {part} has forward hooks" in said()[0]


def test_dropout_alone_in_train_mode(sparse, said):
    """As for Monte Carlo dropout."""
    ffn = next(iter(expert_ffns(sparse("t5-gated", "seq2seq")).values()))
    ffn.dropout.p = 0.5
    x_BTD = torch.randn(1, 3, ffn.width)
    with torch.no_grad():
        assert ffn(x_BTD).equal(ffn(x_BTD))
        ffn.dropout.train()
        assert not ffn(x_BTD).equal(ffn(x_BTD))


def test_dropout_that_drops_in_evaluation_too(sparse, said):
    """As libraries for Monte Carlo dropout put in place of a model's."""

    class Halving(nn.Dropout):
        def forward(self, x):
            return x / 2

    ffn = next(iter(expert_ffns(sparse("t5-gated", "seq2seq")).values()))
    x_BTD = torch.randn(1, 3, ffn.width)
    with torch.no_grad():
        whole = ffn(x_BTD)
        ffn.dropout.__class__ = Halving
        close(ffn(x_BTD), whole / 2)
    assert "there is a Halving between its projections" in said()[0]


def test_a_forward_that_replaces_a_class_s(sparse, batch, said, monkeypatch):
    """As libraries do that change every Linear of a process."""
    model, own = sparse(), nn.Linear.forward
    plain = logits(model, batch)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: own(self, x) * 1.5)
    changed = logits(model, batch)
    assert (changed - plain).abs().max() > 1e-3
    close(changed, masked(model, batch))
    assert "has a forward that replaced Linear's for all modules" in said()[0]
    monkeypatch.undo()
    assert logits(model, batch).equal(plain)


@pytest.mark.parametrize(("place", "name"), [(nn.functional, "linear"), (nn.functional, "silu")])
def test_a_function_of_torch_that_is_replaced(place, name, sparse, batch, said, monkeypatch):
    model = sparse()
    plain, original = logits(model, batch), getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **kwargs: 2 * original(*args, **kwargs))
    assert (logits(model, batch) - plain).abs().max() > 1e-3
    close(logits(model, batch), masked(model, batch))
    assert "a function of torch that the modules call was replaced" in said()[0]
    monkeypatch.undo()
    assert logits(model, batch).equal(plain)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_class_that_is_patched(family, sparse, batch, monkeypatch):
    """A patch may wrap what it replaces, and so bear its name; an activation counts as much as a projection."""
    model = sparse(family)
    ffn = next(iter(expert_ffns(model).values()))
    kind = type(ffn.activation if family == "llama" else ffn.up)
    plain, original = logits(model, batch), kind.forward

    @functools.wraps(original)
    def forward(self, x):
        return 2 * original(self, x)

    monkeypatch.setattr(kind, "forward", forward)
    assert (logits(model, batch) - plain).abs().max() > 1e-3
    close(logits(model, batch), masked(model, batch))


class Twice(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is nn.functional.linear else out


def test_a_mode_that_sees_every_call(sparse, batch, said):
    model = sparse()
    plain = logits(model, batch)
    with Twice():
        changed, expected = logits(model, batch), masked(model, batch)
    assert (changed - plain).abs().max() > 1e-3
    close(changed, expected)
    assert "a mode of torch" in said()[0]
    with torch.device("cpu"):  # a mode, too, of new tensors alone
        assert logits(model, batch).equal(plain)
        assert all(runs_sparsely(model))


@pytest.mark.parametrize(
    ("activation", "name", "value"),
    [(nn.GELU, "approximate", "tanh"), (activations.GELUActivation, "act", torch.relu)],
)
def test_an_activation_that_is_changed_in_place(activation, name, value, sparse, batch):
    model = sparse("gpt2")
    for ffn in expert_ffns(model).values():
        ffn.activation = activation()
    before = logits(model, batch)
    for ffn in expert_ffns(model).values():
        setattr(ffn.activation, name, value)
    changed = logits(model, batch)
    assert (changed - before).abs().max() > 1e-4
    close(changed, masked(model, batch))


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_quantised_weights_that_are_replaced_are_noticed(name, sparse, batch):
    model = quantize(sparse("gpt2").eval())
    before = logits(model, batch)
    for ffn in expert_ffns(model).values():
        setattr(ffn.up, name, 2 * getattr(ffn.up, name))
    changed = logits(model, batch)
    assert (changed - before).abs().max() > 1e-3
    close(changed, masked(model, batch))


def every_neuron(change):
    def permute(model):
        for ffn in expert_ffns(model).values():
            change(ffn.up)

    return permute


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: add_lora(model, ["up", "gate", "down"]), "is a Linear of peft.tuners.lora.layer"),
        (every_neuron(parametrizations.weight_norm), "is a ParametrizedLinear"),
    ],
    ids=["adapters", "parametrised"],
)
def test_neurons_are_not_reordered_below_what_keeps_their_order(change, message, build, batch):
    model = convert(build("llama", "lm", 0.0), LteConfig(expert_size=16), progress=False, group=False)
    change(model)
    before = logits(model, batch)
    with pytest.raises(UserError, match=f"cannot be reordered: a projection {message}.*; group them before that"):
        group_experts(model, progress=False)
    assert logits(model, batch).equal(before)


def test_another_layout_of_the_same_memory_is_noticed(sparse, batch):
    model = sparse()
    plain = logits(model, batch)
    with torch.no_grad():
        for ffn in expert_ffns(model).values():
            weight = ffn.up.weight  # every row becomes the first
            weight.set_(weight.untyped_storage(), 0, weight.shape, (0, 1))
    changed = logits(model, batch)
    assert (changed - plain).abs().max() > 1e-3
    close(changed, masked(model, batch))


def test_another_activation_is_noticed(sparse, batch):
    model = sparse()
    plain = logits(model, batch)
    for ffn in expert_ffns(model).values():
        ffn.activation = nn.ReLU()
    changed = logits(model, batch)
    assert not changed.allclose(plain)
    close(changed, masked(model, batch))
    assert all(runs_sparsely(model))


def test_a_move_to_another_type_is_noticed(sparse):
    model = sparse()
    ffn = next(iter(expert_ffns(model).values()))
    x_BTD = torch.randn(1, 3, ffn.width)
    with torch.no_grad():
        ffn(x_BTD)
        model.bfloat16()
        assert ffn._prepared is None, "it would keep the float32 weights alive"
        expected = ffn(x_BTD.bfloat16())
        assert ffn._prepared.weights.up_ESD.dtype == torch.bfloat16
        ffn.backend = "dense-mask"
        close(expected.float(), ffn(x_BTD.bfloat16()).float(), 0.03)


def test_weights_written_in_place_are_seen(sparse, batch):
    model = sparse()
    plain = logits(model, batch)
    with torch.no_grad():
        for ffn in expert_ffns(model).values():
            ffn.up.weight.mul_(1.5)
    changed = logits(model, batch)
    assert not changed.allclose(plain)
    close(changed, masked(model, batch))


# torch 2.13 scripts its own formulas for forward mode, and deprecated that.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_functional_calls_and_forward_mode(sparse, batch, said):
    model = sparse()
    ffn = next(iter(expert_ffns(model).values()))
    x_BTD, tangent_BTD = torch.randn(1, 3, ffn.width), torch.randn(1, 3, ffn.width)
    other = {"up.weight": 2 * ffn.up.weight}
    with torch.no_grad():
        expected = copy.deepcopy(ffn)
        expected.up.weight.mul_(2)
        close(torch.func.functional_call(ffn, other, (x_BTD,)), expected(x_BTD))
        _, slope = torch.func.jvp(ffn, (x_BTD,), (tangent_BTD,))
        step = 1e-3
        numeric = (ffn(x_BTD + step * tangent_BTD) - ffn(x_BTD - step * tangent_BTD)) / (2 * step)
        close(slope, numeric, 1e-2)
    assert "torch.func or forward-mode differentiation" in said()[0]


def test_copies_choose_for_themselves(sparse, batch):
    model = sparse()
    plain = logits(model, batch)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for ffn in expert_ffns(other).values():
            ffn.up.weight.mul_(1.5)
    changed = logits(other, batch)
    assert not changed.allclose(plain)
    close(changed, masked(other, batch))
    assert logits(model, batch).equal(plain)


def test_it_is_prepared_once(sparse, batch):
    model = sparse()
    logits(model, batch)
    kept = [ffn._prepared for ffn in expert_ffns(model).values()]
    logits(model, batch)
    assert all(ffn._prepared is before for ffn, before in zip(expert_ffns(model).values(), kept, strict=True))


@pytest.mark.parametrize("change", ["tensor subclass", "subclass", "pruned", "parametrised"])
@pytest.mark.parametrize("part", ["mlp.gate_proj", "mlp.down_proj"])
def test_convert_refuses_what_is_not_plain_before_it_changes_anything(change, part, build):
    model = build("llama", "lm")
    CHANGES[change](model.model.layers[1].get_submodule(part))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UnsupportedModelError, match=r"Convert the model before quantising it or adding adapters"):
        convert(model, LteConfig(16), progress=False)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(("family", "part"), [("llama", "mlp"), ("phi3", "mlp"), ("phi3", "mlp.gate_up_proj")])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_convert_loses_no_hook(family, part, kind, build):
    model = build(family, "lm")
    handle = getattr(model.model.layers[1].get_submodule(part), kind)(lambda *given: None)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UserError, match=f"{part} has forward hooks, which would be lost"):
        convert(model, LteConfig(16, "contiguous"), progress=False)
    assert [name for name, _ in model.named_modules()] == names
    handle.remove()
    convert(model, LteConfig(16, "contiguous"), progress=False)


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"": "cpu"}])
def test_weights_on_the_disk_are_computed_with_and_their_routers_are_not_lost(device_map, sparse, tmp_path):
    pytest.importorskip("accelerate", reason="transformers offloads by it")
    model = sparse()
    save_pretrained(model, tmp_path / "model")
    ids_BT = torch.randint(5, 64, (2, 7))
    offloaded = from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk")
    routers = [p for name, p in offloaded.named_parameters() if "selector" in name]
    assert routers
    assert not any(router.is_meta for router in routers)
    with torch.no_grad():
        torch.testing.assert_close(offloaded(ids_BT).logits, model(ids_BT).logits, rtol=1e-5, atol=1e-6)
    if "disk" in device_map.values():
        with pytest.raises(UserError, match=r"weights are not in memory .* load it without offload_folder"):
            save_pretrained(offloaded, tmp_path / "again")
        assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("family", ["phi3", "modernbert"])
def test_fused_weights_on_the_disk_are_refused_by_name(family, sparse, tmp_path):
    pytest.importorskip("accelerate", reason="transformers offloads by it")
    save_pretrained(sparse(family, "lm" if family == "phi3" else "classification"), tmp_path / "model")
    with pytest.raises(UserError, match=r"the weights of \w+\.mlp\.\w+ are offloaded \(device_map\)"):
        from_pretrained(tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "disk")
