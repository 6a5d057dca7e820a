import copy
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import lte_lightning
from lte_lightning import LteConfig, convert, from_pretrained, quantize, restore, save_pretrained, set_backend, set_mode
from lte_lightning.core.accounting.cost import token_cost
from lte_lightning.core.model import prepared
from lte_lightning.core.model.experts import MODES, expert_ffns
from lte_lightning.core.model.folder import CONFIG_FILE, QUANTIZED_FILE, LayoutError
from lte_lightning.core.model.quantize import QUANTIZATIONS, quantization
from lte_lightning.core.model.quantized import QuantizedEmbedding, QuantizedLinear, is_quantized
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.errors import UserError

# Relative error of logits that rounding weights and inputs may make in the tiny models, and does make at least.
ERRORS = {"int8": (1e-4, 0.05), "int4": (0.01, 0.5)}


@pytest.fixture
def routed(build, scatter):
    def routed(family="llama-biases-gqa-tied", head="lm", mode="dense"):
        model = scatter(convert(build(family, head, 0.0), LteConfig(16, "contiguous"), progress=False))
        set_mode(model, mode)
        set_backend(model, "auto")
        return model

    return routed


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def with_dequantized_weights(model, plain):
    """The plain model with the values that the quantised one's blocks stand for."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            target = plain.get_submodule(name)
            weight = module.dequantized()
            target.weight.data.copy_(weight if isinstance(target, nn.Linear) else weight.T)
    return plain


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_every_family_keeps_its_function(family_and_head, kind, routed, batch):
    model = routed(*family_and_head)
    plain = copy.deepcopy(model)
    expected = logits(model, batch)
    assert quantize(model, kind) is model
    assert quantization(model) == kind
    low, high = ERRORS[kind]
    actual = logits(model, batch)
    assert low < error(actual, expected) < high
    # but for rounded inputs
    assert error(actual, logits(with_dequantized_weights(model, plain), batch)) < 0.04
    inside = [module for layer in expert_ffns(model).values() for module in (layer.up, layer.gate, layer.down)]
    assert all(module is None or isinstance(module, QuantizedLinear) for module in inside)
    assert not any(isinstance(module, nn.Linear) for name, module in model.named_modules() if ".layers." in name
                   and "selector" not in name)  # fmt: skip


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_hard_mode_is_the_kernel_and_agrees_with_the_modules(row_family, kind, routed, batch, monkeypatch):
    head = "classification" if row_family in ("bert", "distilbert", "modernbert") else "lm"
    model = quantize(routed(row_family, head, mode="hard"), kind)
    ran = []
    run = prepared.run_experts
    monkeypatch.setattr(prepared, "run_experts", lambda name, *rest: ran.append(name) or run(name, *rest))
    logits(model, batch)
    assert ran == ["cpu"] * len(expert_ffns(model))
    for ffn in expert_ffns(model).values():  # one by one: a later router sees what a former layer rounded
        x_BTD = torch.randn(2, 9, ffn.width)
        found = {}
        for backend in ("cpu", "dense-mask", "reference"):
            ffn.backend = backend
            with torch.no_grad():
                found[backend] = ffn(x_BTD)
        assert ran[-1] == "reference"
        assert error(found["cpu"], found["dense-mask"]) < 1e-3  # both round inputs and hidden activations alike
        assert error(found["cpu"], found["reference"]) < 0.03


def test_modes_differ_and_selection_goes_on(routed, batch):
    model, outputs = quantize(routed()), []
    for mode in MODES:
        set_mode(model, mode)
        outputs.append(logits(model, batch))
    assert not outputs[0].equal(outputs[1])
    assert not outputs[1].equal(outputs[2])
    with RouterTrace(model, batch["attention_mask"]) as trace:
        logits(model, batch)
    assert 0.1 < trace.counts().sparsity() < 0.9


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_of_the_rest(dtype, kind, routed, batch):
    model = routed().to(dtype)
    expected = logits(model, batch)
    quantize(model, kind)
    actual = logits(model, batch)
    assert actual.dtype == dtype
    assert error(actual.float(), expected.float()) < ERRORS[kind][1]
    # casts move inputs and biases alone: the scales are the kernels'
    scale = expert_ffns(model)["model.layers.0.mlp"].up.scale
    kept = scale.clone()
    model.float()
    assert expert_ffns(model)["model.layers.0.mlp"].up.scale.equal(kept)
    assert logits(model, batch).dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "llama-biases-gqa-tied", "gpt2", "gemma", "opt", "t5", "bart"])
def test_embeddings_that_are_tied(family, routed, batch):
    model = routed(family)
    table = model.get_input_embeddings().weight.detach().clone()
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    is_plain = type(model.get_input_embeddings()) is nn.Embedding
    quantize(model, "int4")
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)
    assert model.get_output_embeddings().matrix.bits == 8, "the head keeps eight bits"
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) == (is_tied and is_plain)
    if is_tied and is_plain:
        rows = embedding(torch.tensor([[3, 1, 3]]))
        assert rows.shape == (1, 3, table.shape[1])
        assert error(rows[0], table[[3, 1, 3]]) < 0.01


@pytest.mark.parametrize("mode", ["dense", "hard"])
def test_generation_with_a_cache_and_rows_in_a_batch(mode, routed):
    model = quantize(routed(mode=mode))
    model.config.use_cache = model.generation_config.use_cache = True
    ids_BT = torch.tensor([[5, 9, 11, 7], [8, 3, 30, 12]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
    assert cached.shape == (2, 12)
    static = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), cache_implementation="static", **options)
    assert static.equal(cached)
    for row in range(2):
        alone = model.generate(ids_BT[row : row + 1], attention_mask=torch.ones(1, 4), use_cache=False, **options)
        assert alone.equal(cached[row : row + 1])


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_round_trip(family_and_head, kind, routed, batch, tmp_path):
    model = quantize(routed(*family_and_head, mode="hard"), kind)
    expected = logits(model, batch)
    saved = save_pretrained(model, tmp_path / "saved", about={"stage": "expert"})
    assert logits(model, batch).equal(expected), "saving changed the model"
    loaded = from_pretrained(saved)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert quantization(loaded) == kind
    assert loaded.lte_config == model.lte_config
    assert logits(loaded, batch).equal(expected)
    again = save_pretrained(loaded, tmp_path / "again", about={"stage": "expert"})
    for path in saved.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert not (saved / "model.safetensors").exists()


def test_the_models_own_saving_and_hub_folders(routed, batch, tmp_path):
    model = routed(mode="hard")
    model.save_pretrained(tmp_path)
    expected = logits(model, batch)
    quantize(model)
    model.save_pretrained(tmp_path)  # over the float weights, which then are of another model
    names = {path.name for path in tmp_path.iterdir()}
    assert QUANTIZED_FILE in names
    assert "model.safetensors" not in names
    assert logits(from_pretrained(tmp_path), batch).equal(logits(model, batch))
    again = routed(mode="hard")
    again.save_pretrained(tmp_path)
    assert QUANTIZED_FILE not in {path.name for path in tmp_path.iterdir()}
    assert logits(from_pretrained(tmp_path), batch).equal(expected)


def test_quantise_while_loading(routed, batch, tmp_path):
    model = routed(mode="hard")
    save_pretrained(model, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved", quantize="int4")
    assert logits(loaded, batch).equal(logits(quantize(model, "int4"), batch))
    saved = save_pretrained(loaded, tmp_path / "int4")
    assert quantization(from_pretrained(saved, quantize="int4")) == "int4"
    with pytest.raises(UserError, match=r"was saved as int4, and cannot be made int8; load the model"):
        from_pretrained(saved, quantize="int8")
    with pytest.raises(UserError, match=r"unknown quantisation 'int2'; there are int8, int4"):
        from_pretrained(tmp_path / "saved", quantize="int2")
    with pytest.raises(UserError, match=r"is quantised, and is loaded with dtype.*leave out device_map, revison"):
        from_pretrained(saved, device_map="cpu", revison="main")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_the_type_of_a_loaded_one(dtype, routed, batch, tmp_path):
    saved = save_pretrained(quantize(routed(mode="hard").bfloat16()), tmp_path / "saved")
    loaded = from_pretrained(saved, **({} if dtype is None else {"dtype": dtype}))
    assert logits(loaded, batch).dtype == (dtype or torch.bfloat16)
    types = {p.dtype for p in loaded.parameters()}
    assert types == {dtype or torch.bfloat16}


def test_plain_loaders_are_told_why_not(routed, tmp_path):
    saved = save_pretrained(quantize(routed()), tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "lte_lightning", "kind": "int8"}  # vLLM and others refuse
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(saved)
    lte_lightning.register()
    try:
        assert is_quantized(AutoModelForCausalLM.from_pretrained(saved))
    finally:
        lte_lightning.register(False)


def damaged(saved, folder, change):
    shutil.copytree(saved, folder)
    tensors = load_file(folder / QUANTIZED_FILE)
    change(tensors)
    save_file(tensors, folder / QUANTIZED_FILE, {"format": "pt"})
    description = json.loads((folder / CONFIG_FILE).read_text())
    del description["digest"]  # it would find most of these by itself
    (folder / CONFIG_FILE).write_text(json.dumps(description))
    return folder


def test_damaged_folders_are_refused(routed, tmp_path):
    saved = save_pretrained(quantize(routed()), tmp_path / "saved")
    up, norm = "model.layers.0.mlp.up", "model.norm.weight"
    for name, change, message in (
        ("lacks", lambda t: t.pop(f"{up}.scale"), "mlp.up lacks its scale"),
        ("bias", lambda t: t.pop(f"{up}.bias"), "mlp.up has a bias, or lacks it"),
        ("norm", lambda t: t.pop(norm), "weights are missing: model.norm.weight"),
        ("more", lambda t: t.update(more=torch.zeros(2)), "the model has no more of shape"),
        ("shape", lambda t: t.update({f"{up}.scale": t[f"{up}.scale"][:, :1].clone()}), r"instead of torch.bfloat16"),
        ("type", lambda t: t.update({f"{up}.blocks": t[f"{up}.blocks"].float()}), r"instead of torch.uint8"),
    ):
        with pytest.raises(LayoutError, match=f"damaged: .*{message}"):
            from_pretrained(damaged(saved, tmp_path / name, change))
    wrong = damaged(saved, tmp_path / "nan", lambda t: t[norm].fill_(float("nan")))
    with pytest.raises(UserError, match="NaN or infinite"):
        from_pretrained(wrong)
    wrong = damaged(saved, tmp_path / "nan-scale", lambda t: t[f"{up}.scale"].fill_(float("nan")))
    with pytest.raises(UserError, match=r"NaN or infinite values: .*mlp\.up\.scale"):
        from_pretrained(wrong)
    for name, about, message in (
        ("none", None, "does not say how the weights are quantised"),
        ("kind", {"kind": "int4", "tied_embedding": True}, "they are int8, and lte_config.json says 'int4'"),
    ):
        wrong = damaged(saved, tmp_path / name, lambda t: None)
        description = json.loads((wrong / CONFIG_FILE).read_text())
        (wrong / CONFIG_FILE).write_text(json.dumps(description | {"quantized": about}))
        with pytest.raises(LayoutError, match=message):
            from_pretrained(wrong)
    other = shutil.copytree(saved, tmp_path / "digest")
    tensors = load_file(other / QUANTIZED_FILE)
    tensors[norm] += 1
    save_file(tensors, other / QUANTIZED_FILE)
    with pytest.raises(LayoutError, match=r"norm.weight differ"):
        from_pretrained(other)
    newer = shutil.copytree(saved, tmp_path / "newer")
    text = (newer / CONFIG_FILE).read_text()
    (newer / CONFIG_FILE).write_text(text.replace('"quantized-1"', '"quantized-2"'))
    with pytest.raises(LayoutError, match=r"layout version 'quantized-2', this lte-lightning reads 1; install"):
        from_pretrained(newer)


def test_what_cannot_be_quantised_is_refused_and_left_alone(routed, build, batch):
    model = routed()
    before = logits(model, batch)

    def refused(message):
        with pytest.raises(UserError, match=message):
            quantize(model)
        assert not is_quantized(model)

    with pytest.raises(UserError, match=r"unknown quantisation 'fp8'; there are int8, int4"):
        quantize(model, "fp8")
    with pytest.raises(UserError, match="no expert FFNs"):
        quantize(build("llama", "lm"))
    model.train()
    refused(r"train mode.*model.eval\(\) first")
    model.eval()
    projection = model.model.layers[1].self_attn.q_proj
    hook = projection.register_forward_hook(lambda *_: None)
    refused(r"model\.layers\.1\.self_attn\.q_proj of this LlamaForCausalLM has forward hooks.*remove them")
    hook.remove()
    nn.utils.parametrizations.weight_norm(projection)
    refused(r"q_proj.* is a ParametrizedLinear")
    nn.utils.parametrize.remove_parametrizations(projection, "weight")
    projection.lora_A = nn.Linear(32, 2)
    refused(r"q_proj.*has an adapter.*merge it first")
    del projection.lora_A
    kept = projection.weight.data[0, 0].item()
    projection.weight.data[0, 0] = float("nan")
    refused(r"q_proj.*holds NaN")
    projection.weight.data[0, 0] = kept
    torch.testing.assert_close(logits(model, batch), before)
    with pytest.raises(UserError, match=r"up of this LlamaForCausalLM is on meta.*CPU only"):
        quantize(copy.deepcopy(model).to("meta"))
    quantize(model)
    with pytest.raises(UserError, match="quantised already"):
        quantize(model)


@pytest.mark.parametrize("mode", MODES)
def test_training_is_refused_by_name(mode, routed, batch):
    model = quantize(routed(mode=mode))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model(**batch)  # grad mode by itself is no training
    with pytest.raises(UserError, match="a quantised model cannot be trained"):
        model.train()(**batch)
    model.eval()
    embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    with pytest.raises(UserError, match="a quantised model cannot be trained"):
        model(inputs_embeds=embedded, attention_mask=batch["attention_mask"])


def test_it_cannot_be_undone(routed, tmp_path):
    model = quantize(routed())
    with pytest.raises(UserError, match=r"cannot be made plain again.*set_mode\(model, 'dense'\)"):
        restore(model)
    with pytest.raises(UserError, match="quantised; count before"):
        token_cost(model)
    with pytest.raises(UserError, match="leave out state_dict, max_shard_size"):
        model.save_pretrained(tmp_path / "nowhere", state_dict={}, max_shard_size="1GB")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies(way, routed, batch):
    model = quantize(routed(mode="hard"))
    expected = logits(model, batch)
    if way == "state_dict":
        other = quantize(routed(mode="hard"))
        with torch.no_grad():
            for tensor in other.state_dict().values():
                tensor.zero_()
        other.load_state_dict(model.state_dict())
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert logits(other, batch).equal(expected)


def test_nan_in_one_token_stays_there(routed, batch):
    model = quantize(routed("llama", mode="hard"))
    ffn = expert_ffns(model)["model.layers.0.mlp"]
    x_BTD = torch.randn(1, 6, 32)
    with torch.no_grad():
        clean = ffn(x_BTD)
        x_BTD[0, 2, 5] = float("nan")
        spoilt = ffn(x_BTD)
    others = torch.arange(6) != 2
    assert spoilt[0, others].equal(clean[0, others])


# Hard mode of each kind is compiled whole below, too.
@pytest.mark.parametrize(("kind", "mode"), [("int8", "dense"), ("int4", "hard")])
def test_torch_compile_makes_one_graph(kind, mode, routed, batch):
    model = quantize(routed(mode=mode), kind)
    expected = logits(model, batch)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(logits(compiled, batch), expected) < 1e-4


@pytest.mark.parametrize(("kind", "rows"), [(None, 1), (None, 4), ("int8", 4), ("int4", 1)])
def test_decoding_compiled_with_a_static_cache(kind, rows, routed):
    """As docs/speed.md has it: equal tokens, a graph for the prompt and one for a token, and never another."""
    model = routed(mode="hard")
    if kind:
        quantize(model, kind)
    model.config.use_cache = model.generation_config.use_cache = True
    ids_BT = torch.randint(3, 64, (rows, 4), generator=torch.Generator().manual_seed(rows))
    options = {"attention_mask": torch.ones_like(ids_BT), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["max_new_tokens"] = 8
    expected = model.generate(ids_BT, **options)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend)
    options["cache_implementation"] = "static"
    for _ in range(2):
        assert model.generate(ids_BT, **options).equal(expected)
        assert len(graphs) == 2
    kernel = "quantized_ffn" if kind else "cpu_ffn"
    calls = [str(node.target) for node in graphs[1].graph.nodes if kernel in str(node.target)]
    assert len(calls) == len(expert_ffns(model))
