import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lte_lightning import LteConfig, convert, set_mode
from lte_lightning.core.accounting.memory import GIB, training_memory
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.core.model.sharding import shard
from lte_lightning.errors import UserError


def small(family: str) -> PreTrainedModel:
    common = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    # Dropout of attention would take the kernel that keeps the scores.
    model = (
        LlamaForCausalLM(LlamaConfig(intermediate_size=176, use_cache=False, **common))
        if family == "llama"
        else BertForMaskedLM(BertConfig(intermediate_size=256, attention_probs_dropout_prob=0.0, **common))
    )
    return convert(model, LteConfig(16, "contiguous"), progress=False).train()


def kept(model: PreTrainedModel, ids_BT: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    return sum(sizes.values())


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("mode", ["dense", "soft", "hard"])
def test_activations_are_near_what_autograd_keeps(family, mode):
    model = small(family)
    set_mode(model, mode)
    for parameter in selector_parameters(model):
        parameter.requires_grad_(mode == "soft")
    ids_BT = torch.randint(0, 64, (4, 64))
    memory = training_memory(model, 256, "32-true", soft=mode == "soft")
    assert memory.activations == pytest.approx(kept(model, ids_BT), rel=0.15)


def test_checkpointed_activations_are_near_what_autograd_keeps():
    model = small("llama")
    set_mode(model, "soft")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    memory = training_memory(model, 256, "32-true")
    one_layer = (memory.activations - head(256, 4)) / 4
    # what the backward pass computes again comes on top of what is kept until then
    ids_BT = torch.randint(0, 64, (4, 64))
    assert memory.activations_checkpointed == pytest.approx(kept(model, ids_BT) + one_layer, rel=0.2)


def head(tokens: int, size: int) -> int:
    return tokens * 64 * (size + 8)


def test_weights_gradients_and_moments_are_exact():
    model = small("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    set_mode(model, "soft")
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    memory = training_memory(model, 4, "32-true")
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters())
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert memory.optimizer == sum(moment.nbytes for moment in moments)


def test_what_is_frozen_has_neither_gradient_nor_moments():
    model = small("llama")
    before = training_memory(model, 0, "32-true")
    embedding = model.get_input_embeddings().weight.requires_grad_(False)
    after = training_memory(model, 0, "32-true")
    assert (before.gradients - after.gradients, before.optimizer - after.optimizer) == (
        embedding.nbytes,
        2 * embedding.nbytes,
    )
    assert before.weights == after.weights


def test_precisions():
    model = small("llama")
    full, half, mixed = (training_memory(model, 256, name) for name in ("32-true", "bf16-true", "bf16-mixed"))
    assert (half.weights, half.gradients, half.optimizer) == (
        full.weights / 2,
        full.gradients / 2,
        full.optimizer / 2,
    )
    assert (mixed.gradients, mixed.optimizer, mixed.activations) == (full.gradients, full.optimizer, half.activations)
    layer = 4 * 64 * 64 + 3 * 64 * 176
    assert mixed.weights == full.weights + 2 * (4 * layer + 64 * 64)  # autocast's copies: layers and head
    assert half.activations - head(256, 2) == (full.activations - head(256, 4)) / 2


def test_tokens_count_for_activations_only():
    model = small("llama")
    none, one, two = (training_memory(model, tokens) for tokens in (0, 100, 200))
    assert (none.activations, none.activations_checkpointed) == (0, 0)
    assert (two.activations, two.activations_checkpointed) == (2 * one.activations, 2 * one.activations_checkpointed)
    assert none.weights == two.weights
    assert one.activations_checkpointed < one.activations


def test_llama_7b_in_half_precision_with_checkpointing():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    convert(model, LteConfig(32, "contiguous", router_bias=False), progress=False)
    memory = training_memory(model, 2048, "bf16-true")
    parameters = 6_738_415_616 + 32 * 344 * 4096
    assert memory.weights + memory.gradients + memory.optimizer == 8 * parameters  # 2 each for four of them
    inputs = 2 * 2048 * 32 * 4096
    assert inputs < memory.activations_checkpointed < 0.25 * memory.activations
    assert memory.describe(checkpointing=True).startswith(f"{memory.total(checkpointing=True) / GIB:.2f} GiB (weights ")
    assert memory.total() - memory.total(checkpointing=True) == memory.activations - memory.activations_checkpointed


def test_the_parts_of_a_sharded_model_add_up_to_the_whole_one():
    model = small("llama")
    one, four = (training_memory(model, 256, "32-true", devices=n, sharded=True) for n in (1, 4))
    assert [4 * four.weights, 4 * four.gradients, 4 * four.optimizer] == [one.weights, one.gradients, one.optimizer]
    assert (one.activations, one.shared) == (four.activations, four.shared)
    whole = training_memory(model, 256, "32-true", devices=4)
    assert (whole.weights, whole.shared) == (one.weights, one.gradients)
    in_layer = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(p.nbytes for p in model.parameters()) - 4 * 4 * in_layer
    assert four.shared == outside + 4 * 4 * in_layer
    assert four.total() == four.weights + four.gradients + four.optimizer + four.activations + four.shared


def test_a_sharded_model_under_autocast_keeps_whole_copies_of_its_weights(tmp_path):
    """They are what FSDP2 does not divide."""
    model = set_soft(small("llama"))
    shapes = {tuple(sorted(m.weight.shape)) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    mine, copies = training_memory(model, 256, "bf16-mixed", devices=1, sharded=True), {}
    assert mine.weights == training_memory(model, 256, "bf16-mixed").weights
    many = training_memory(model, 256, "bf16-mixed", devices=1000, sharded=True)

    def pack(tensor):
        if tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in shapes:
            copies[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shard(model, init_device_mesh("cpu", (1,)))
        ids_BT = torch.randint(0, 64, (4, 60))  # no activation has the shape of a weight
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu"):
            model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert many.weights == pytest.approx(sum(copies.values()), rel=0.05)


def set_soft(model: PreTrainedModel) -> PreTrainedModel:
    set_mode(model, "soft")
    return model


@pytest.mark.parametrize(
    ("tokens", "precision", "message"), [(1, "fp4", "unknown precision 'fp4'"), (-1, "32-true", "-1")]
)
def test_bad_input(tokens, precision, message):
    with pytest.raises(UserError, match=message):
        training_memory(small("bert"), tokens, precision)
