import copy
import pickle
from functools import partial

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.trainer_utils import load_sharded_checkpoint

from lte_lightning import LteConfig, convert, from_pretrained, restore, save_pretrained, set_mode
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.names import own_names
from lte_lightning.errors import UserError

CONFIG = LteConfig(16, "kmeans", threshold=0.55, seed=3)
PLAIN = {
    "classification": AutoModelForSequenceClassification,
    "lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}


@pytest.fixture
def routed(build, scatter):
    """`routed(family, head)`: a converted model in hard mode, whose routers leave out about half of the experts."""

    def routed(family="bert", head="classification"):
        model = scatter(convert(build(family, head), CONFIG, progress=False))
        set_mode(model, "hard")
        return model

    return routed


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_in_memory(model):
    with own_names():
        return dict(model.state_dict())


SAVES = {
    "alone": lambda model: {},
    "state": lambda model: {"state_dict": model.state_dict()},
    "state-by-memory": lambda model: {"state_dict": names_in_memory(model)},
    "accelerate": lambda model: {"state_dict": Accelerator(cpu=True).get_state_dict(model)},
}


@pytest.mark.parametrize("options", SAVES.values(), ids=SAVES)
def test_the_method_writes_what_the_function_writes(routed, row_family, options, tmp_path):
    model = routed(row_family, "lm" if row_family not in ("bert", "distilbert", "modernbert") else "classification")
    save_pretrained(model, tmp_path / "function")
    assert model.save_pretrained(tmp_path / "method", **options(model)) is None
    assert content(tmp_path / "method") == content(tmp_path / "function")


@pytest.mark.parametrize("size", ["50GB", "20KB"], ids=["one-file", "sharded"])
def test_a_saved_model_is_read_sparse_and_dense(routed, batch, family_and_head, size, tmp_path):
    model = routed(*family_and_head)
    sparse = logits(model, batch)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "20KB")
    assert logits(from_pretrained(tmp_path, backend="dense-mask"), batch).equal(sparse)
    set_mode(model, "dense")
    plain, info = PLAIN[family_and_head[1]].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    # a fused projection is one product in a plain model and two here
    fused = next(iter(expert_ffns(model).values())).row.fused
    torch.testing.assert_close(logits(plain, batch), logits(model, batch), rtol=1e-6, atol=1e-6 if fused else 0.0)


def test_the_folder_keeps_what_others_put_there(routed, batch, tmp_path):
    model = routed()
    (tmp_path / "vocab.txt").write_text("the\n")
    (tmp_path / "checkpoint-3").mkdir()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "vocab.txt").read_text() == "the\n"
    assert {path.name for path in tmp_path.glob("*safetensors*")} == {"lte_routers.safetensors", "model.safetensors"}
    assert (tmp_path / "checkpoint-3").is_dir()
    assert not list(tmp_path.glob(".*"))
    assert logits(from_pretrained(tmp_path, backend="dense-mask"), batch).equal(logits(model, batch))


def test_other_processes_write_nothing(routed, tmp_path):
    routed().save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


def without(model, *endings):
    return {key: value for key, value in model.state_dict().items() if not key.endswith(endings)}


DOWN = "bert.encoder.layer.1.output.dense.weight"


def cast(name, dtype, model):
    """The state dict with tensors of that name in another type."""
    state = model.state_dict()
    return {key: value.to(dtype) if key.endswith(name) else value for key, value in state.items()}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda m: without(m, "selector.weight", "selector.bias"), r"no routers \(.*selector\.weight.* and 1 more\)"),
        (
            lambda m: without(m, "0.output.dense.weight"),
            r"missing .*: bert.*0\.output\.dense\.weight",
        ),
        (lambda m: without(m, "1.intermediate.dense.weight"), r"missing .* bert.*1\.intermediate\.dense\.weight"),
        (lambda m: m.state_dict() | {"bert.extra": torch.zeros(2)}, r"no weights bert\.extra"),
        (lambda m: {f"module.{key}": value for key, value in m.state_dict().items()}, "no routers"),
        (lambda m: m.state_dict() | {"classifier.bias": torch.zeros(2)}, r"classifier\.bias is \[2\], .* is \[3\]"),
        (lambda m: {}, "no routers"),
        (
            partial(cast, DOWN, torch.int32),
            r"output\.dense\.weight is of type torch\.int32, and a model of that could not",
        ),
        (partial(cast, "selector.weight", torch.int32), r"selector\.weight is of type torch\.int32"),
        (partial(cast, DOWN, torch.float8_e4m3fn), r"output\.dense\.weight is of type torch\.float8_e4m3fn"),
        (
            lambda m: m.state_dict() | {DOWN: m.state_dict()[DOWN].to_sparse()},
            f"{DOWN} .* is a tensor of layout torch.sp",
        ),
        (lambda m: m.state_dict() | {DOWN: m.state_dict()[DOWN].numpy()}, f"{DOWN} of the state dict is a ndarray"),
        (
            lambda m: m.state_dict() | {DOWN: TwoTensor(m.state_dict()[DOWN], m.state_dict()[DOWN])},
            f"{DOWN} of the state dict is a TwoTensor of torch.testing",
        ),
    ],
    ids=[
        *("routers", "down", "up", "unknown", "prefix", "shape", "empty"),
        *("whole numbers", "whole routers", "8 bits", "sparse", "numpy", "made of others"),
    ],
)
@pytest.mark.parametrize("how", ["method", "function"])
def test_a_state_that_could_not_be_loaded_again_is_not_saved(routed, tmp_path, state, message, how):
    model = routed()
    before, given = {key: value.clone() for key, value in model.state_dict().items()}, state(model)
    save = partial(save_pretrained, model) if how == "function" else model.save_pretrained
    with pytest.raises(UserError, match=message):
        save(tmp_path / "saved", state_dict=given)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_a_format_that_others_cannot_load_is_not_saved(routed, tmp_path):
    with pytest.raises(UserError, match="distributed_checkpoint writes no folder that others can load"):
        routed().save_pretrained(tmp_path / "saved", distributed_checkpoint=True)


def test_a_part_that_was_converted(build, batch, tmp_path):
    model = build("llama", "lm")
    convert(model.model, CONFIG, progress=False)
    model.save_pretrained(tmp_path)
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path), batch).equal(logits(model, batch))


def test_adapters_and_other_heads_are_not_saved(routed, tmp_path):
    model = routed()
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 3))
    with pytest.raises(UserError, match=r"no weights classifier\.0\.weight, .* and 1 more"):
        model.save_pretrained(tmp_path / "head")
    adapted = routed("llama", "lm")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), adapted)
    with pytest.raises(UserError, match=r"no weights .*q_proj\.base_layer\.weight.*merge the adapters first"):
        adapted.save_pretrained(tmp_path / "lora")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("save", SAVES, ids=SAVES)
def test_loading_takes_either_names(routed, build, batch, row_family, save):
    head = "lm" if row_family not in ("bert", "distilbert", "modernbert") else "classification"
    model = routed(row_family, head)
    state = SAVES[save](model).get("state_dict", model.state_dict())
    other = convert(build(row_family, head), LteConfig(16, "random", seed=8), progress=False)
    set_mode(other, "hard")
    for ffn in expert_ffns(other).values():
        ffn.threshold = 0.55
    assert not logits(other, batch).equal(logits(model, batch))
    result = other.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert logits(other, batch).equal(logits(model, batch))


def test_a_state_dict_has_the_plain_names_at_any_depth(routed, build, row_family):
    model = routed(row_family)
    plain = build(row_family).state_dict()
    found = {key: value for key, value in model.state_dict().items() if ".selector." not in key}
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in plain.items()}
    assert [f"inner.{key}" for key in model.state_dict()] == list(nn.ModuleDict({"inner": model}).state_dict())


def test_a_state_dict_shares_memory(routed, row_family):
    model = routed(row_family)
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {value.untyped_storage().data_ptr() for value in model.state_dict().values()} <= held | {
        buffer.untyped_storage().data_ptr() for buffer in model.buffers()
    }


def test_weights_of_a_folder_bring_their_routers(routed, build, batch, tmp_path):
    model = routed()
    model.save_pretrained(tmp_path)
    other = convert(build(), LteConfig(16, "random", threshold=0.55, seed=8), progress=False)
    set_mode(other, "hard")
    with pytest.raises(
        UserError, match=r"was converted otherwise than this model \(grouping: kmeans there, random here\)"
    ):
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    other.lte_config.grouping = "kmeans"
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert logits(other, batch).equal(logits(model, batch))


def test_weights_that_are_changed_in_a_state_dict(routed, batch):
    """The routers in it are the model's own tensors, and were given all the same."""
    model = routed()
    state = model.state_dict()
    state["bert.encoder.layer.1.output.dense.weight"] = state["bert.encoder.layer.1.output.dense.weight"] * 2
    before = logits(model, batch)
    model.load_state_dict(state)
    assert not logits(model, batch).allclose(before)


def test_weights_without_routers(routed, build, batch):
    model = routed()
    weights = {key: value.clone() for key, value in without(model, "selector.weight", "selector.bias").items()}
    assert len(model.load_state_dict(weights, strict=False).missing_keys) == 4  # those that it has already
    weights["bert.encoder.layer.1.output.dense.weight"] += 1.0
    expected = logits(model, batch)
    with pytest.raises(UserError, match=r"come without routers \(lte_routers\.safetensors is the file"):
        model.load_state_dict(weights, strict=False)
    assert logits(model, batch).equal(expected)
    set_mode(model, "dense")
    model.load_state_dict(weights, strict=False)
    plain = build()
    plain.load_state_dict(weights)
    assert logits(model, batch).equal(logits(plain, batch))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("path", ["bert", "bert.encoder.layer.1"])
def test_parts_without_routers(path, strict, routed, batch):
    """A part of a model has torch's own `load_state_dict`."""
    model = routed()
    part, before = model.get_submodule(path), logits(model, batch)
    weights = {key: value.clone() for key, value in part.state_dict().items() if ".selector." not in f".{key}"}
    if not strict:
        part.load_state_dict(weights, strict=False)  # those that it has already
    weights = {key: value + 1.0 if key.endswith("output.dense.weight") else value for key, value in weights.items()}
    with pytest.raises(UserError, match=r"comes without its router \(.*selector\), and that of the model belongs to"):
        part.load_state_dict(weights, strict=strict)
    if path != "bert":  # of several layers torch loads one after the other
        assert logits(model, batch).equal(before)
    set_mode(model, "dense")
    part.load_state_dict(weights, strict=False)


def test_a_router_that_shares_its_memory_with_another(routed, batch, tmp_path):
    model = routed()
    state = model.state_dict()
    first, second = (key for key in state if key.endswith("selector.weight"))
    folder = save_pretrained(model, tmp_path / "saved", state_dict=state | {second: state[first]})
    model.load_state_dict(state | {second: state[first].clone()})
    torch.testing.assert_close(logits(from_pretrained(folder), batch), logits(model, batch))


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("family", ["bert", "phi3", "gpt2", "t5"])
def test_a_copy_is_as_good(routed, batch, family, make, tmp_path):
    model = routed(family)
    copied = make(model)
    assert type(copied) is type(model)
    copied.save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "model")
    assert content(tmp_path / "copy") == content(tmp_path / "model")
    if make is not copy.copy:
        for parameter in copied.parameters():
            parameter.data.zero_()
        model.save_pretrained(tmp_path / "again")
        assert content(tmp_path / "again") == content(tmp_path / "model")


def test_a_model_that_torch_saves_whole(routed, batch, tmp_path):
    model = routed()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert logits(loaded, batch).equal(logits(model, batch))
    loaded.save_pretrained(tmp_path / "saved")
    assert logits(from_pretrained(tmp_path / "saved", backend="dense-mask"), batch).equal(logits(model, batch))


def test_a_restored_model_is_plain_again(routed, build, row_family, tmp_path):
    plain = restore(routed(row_family))
    assert type(plain) is type(build(row_family))
    assert b"lte_lightning" not in pickle.dumps(plain)
    plain.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("lte*"))
    build(row_family).load_state_dict(plain.state_dict())


def test_the_class_is_called_as_before(routed, build):
    model, plain = routed("gpt2", "lm"), build("gpt2", "lm")
    assert isinstance(model, type(plain))
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "config_class"):
        assert getattr(type(model), name) == getattr(type(plain), name)
    assert model.can_generate()
    unconverted = type(model)(plain.config)
    assert not expert_ffns(unconverted)
    assert unconverted.state_dict().keys() == plain.state_dict().keys()


def test_accelerate(routed, build, batch, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = routed()
    prepared = accelerator.prepare(model)
    accelerator.save_model(prepared, tmp_path / "weights", max_shard_size="20KB")
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path / "saved", state_dict=accelerator.get_state_dict(prepared), save_function=accelerator.save
    )
    sparse = logits(model, batch)
    assert logits(from_pretrained(tmp_path / "saved", backend="dense-mask"), batch).equal(sparse)
    other = convert(build(), CONFIG, progress=False)
    load_checkpoint_in_model(other, tmp_path / "weights", strict=True)
    set_mode(other, "hard")
    assert logits(other, batch).equal(sparse)
    again = convert(build(), LteConfig(16, "kmeans", threshold=0.55, seed=8), progress=False)
    load_checkpoint_in_model(again, tmp_path / "saved")  # the routers lie beside
    set_mode(again, "hard")
    assert logits(again, batch).equal(sparse)
    set_mode(model, "dense")
    plain = build()
    load_checkpoint_in_model(plain, tmp_path / "weights")
    assert logits(plain, batch).equal(logits(model, batch))
    accelerator.save_state(tmp_path / "state")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path / "state")
    set_mode(model, "hard")
    assert logits(model, batch).equal(sparse)


def test_a_sharded_folder_that_the_trainer_loads(routed, build, batch, tmp_path):
    model = routed()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    other = convert(build(), LteConfig(16, "kmeans", threshold=0.55, seed=8), progress=False)
    set_mode(other, "hard")
    load_sharded_checkpoint(other, tmp_path, strict=False)
    assert logits(other, batch).equal(logits(model, batch))


@pytest.mark.parametrize("family", ["llama", "phi3"])  # the other one's projection is fused
def test_weights_sharded_over_devices(family, routed, batch, tmp_path):
    model = routed(family, "lm")
    sparse = logits(model, batch)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with pytest.raises(UserError, match=r"are sharded over devices; gather them in every process"):
            model.save_pretrained(tmp_path)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = {key: value.clone() for key, value in get_model_state_dict(model, options=options).items()}
        model.save_pretrained(tmp_path, state_dict=gathered)
        set_model_state_dict(model, {key: 0 * value for key, value in gathered.items()}, options=options)
        assert not logits(model, batch).equal(sparse)
        model.reshard()  # the root stays whole after a forward pass
        set_model_state_dict(model, gathered, options=options)
        assert logits(model, batch).equal(sparse)
        if family == "phi3":
            with pytest.raises(UserError, match=r"^fused projections of this FSDPPhi3ForCausalLM are sharded"):
                restore(model)
            assert logits(model, batch).equal(sparse)
    finally:
        torch.distributed.destroy_process_group()
    assert logits(from_pretrained(tmp_path, backend="dense-mask"), batch).equal(sparse)
