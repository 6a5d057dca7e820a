"""Graphs of the masked function: torch.export's, in onnxruntime, in openvino; all give the sparse model's values."""

import copy
import re
import sys
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers import AutoModelForSequenceClassification as Classifier

import lte_lightning
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.errors import UserError
from lte_lightning.export.dense import write_dense
from lte_lightning.export.extension import write_openvino_sparse
from lte_lightning.export.graph import Graph, to_program, write_onnx, write_openvino
from lte_lightning.kernels.cpu.build import library

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
T5 = {"d_model": 32, "d_ff": 96, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (Classifier, {}),
    "distilbert": (Classifier, {"dim": 32, "hidden_dim": 96, "n_heads": 4, "n_layers": 2}),
    "gpt2": (AutoModelForCausalLM, {"bos_token_id": 1, "eos_token_id": 1}),
    "llama": (AutoModelForCausalLM, {}),
    "mpnet": (AutoModel, {}),
    "phi3": (AutoModelForCausalLM, {"bos_token_id": 1, "eos_token_id": 1}),
    "t5": (AutoModelForSeq2SeqLM, T5),
}


def build(family: str, mode: str = "hard", **lte: Any) -> Any:
    auto_class, options = MODELS[family]
    torch.manual_seed(0)
    model = auto_class.from_config(AutoConfig.for_model(family, **SIZES | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    lte_lightning.convert(model, lte_lightning.LteConfig(expert_size=16, **lte), progress=False)
    with torch.no_grad():
        for parameter in selector_parameters(model):
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    lte_lightning.set_mode(model, mode)
    return model


def inputs(graph: Graph, texts: int, length: int, decoder_length: int) -> dict[str, torch.Tensor]:
    sizes = {"batch": texts, "length": length, "decoder_length": decoder_length}
    made = {name: torch.randint(3, 64, [sizes[axis] for axis in axes]) for name, axes in graph.axes().items()}
    made["attention_mask"] = torch.ones(texts, length, dtype=torch.long)
    made["attention_mask"][0, length - 2 :] = 0
    if "token_type_ids" in made:
        made["token_type_ids"] = (torch.arange(length) > 2).long().repeat(texts, 1)
    return made


SHAPES = [(3, 9, 4), (1, 4, 1), (2, 20, 11)]


@torch.no_grad()
def assert_the_same(graph: Graph, run: Any) -> None:
    """`run(inputs)` gives what the graph's model does, for batches and lengths that the graph was not made with."""
    for shape in SHAPES:
        batch = inputs(graph, *shape)
        expected = graph(**batch)
        dense = expected.clone()
        torch.testing.assert_close(torch.as_tensor(run(batch)), expected, atol=1e-5, rtol=1e-4)
        lte_lightning.set_mode(graph.model, "dense")
        dense = graph(**batch)
        lte_lightning.set_mode(graph.model, "hard")
        assert not torch.allclose(dense, expected, atol=1e-3)  # the mask does something


@pytest.mark.parametrize("family", MODELS)
def test_torch_export_gives_the_sparse_models_values(family):
    model = build(family)
    program = to_program(model)
    assert_the_same(Graph(model), lambda batch: program.module()(**batch))
    assert all(ffn.guards for ffn in expert_ffns(model).values())


def test_a_program_is_saved_and_loaded(tmp_path):
    model = build("bert")
    torch.export.save(to_program(model), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert_the_same(Graph(model), lambda batch: program.module()(**batch))


@pytest.mark.parametrize(("family", "selector"), [("llama", "kla"), ("bert", "softmax")])
def test_other_selectors(family, selector):
    model = build(family, selector=selector, target_sparsity=0.5)
    program, graph = to_program(model), Graph(model)
    batch = inputs(graph, 3, 9, 4)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**batch), graph(**batch), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the packages, about their own parts, when they are first imported
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_onnxruntime_gives_the_sparse_models_values(family, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    model = build(family)
    write_onnx(model, str(tmp_path), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.onnx", "config.json"}
    session, graph = runtime.InferenceSession(tmp_path / "out" / "model.onnx"), Graph(model)
    assert {one.name: tuple(one.shape) for one in session.get_inputs()} == graph.axes()
    assert [one.name for one in session.get_outputs()] == ["logits"]
    assert_the_same(graph, lambda batch: session.run(None, {key: value.numpy() for key, value in batch.items()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_openvino_gives_the_sparse_models_values(family, tmp_path):
    openvino = pytest.importorskip("openvino", reason="the extra export is not installed")
    model = build(family)
    write_openvino(model, str(tmp_path), tmp_path / "out")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # or bfloat16, where the processor has it
    compiled = openvino.compile_model(tmp_path / "out" / "openvino_model.xml", "CPU", exact)
    assert_the_same(
        Graph(model), lambda batch: compiled({key: value.numpy() for key, value in batch.items()})["logits"]
    )


@pytest.mark.parametrize(
    ("write", "package", "what"), [(write_onnx, "onnxscript", "ONNX"), (write_openvino, "openvino", "OpenVINO")]
)
def test_a_missing_package_is_named(write, package, what, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'{what} models need a package: pip install "lte-lightning\[export\]"'):
        write(build("bert"), str(tmp_path), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def write_plain(model, source, folder):
    write_dense(lte_lightning.restore(model), {}, source, folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [write_plain, write_onnx, write_openvino])
def test_a_full_disk_is_one_line_and_leaves_nothing(write, no_file_larger_than, tmp_path):
    pytest.importorskip("openvino", reason="the extra export is not installed")
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    model, folder = build("gpt2"), tmp_path / "out"
    with pytest.raises(UserError, match=f"^cannot write {folder}: .*") as refused, no_file_larger_than(20_000):
        write(model, str(tmp_path), folder)
    assert re.search("File too large|as it does on a full disk", str(refused.value))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def sparse_in_openvino(tmp_path, monkeypatch):
    """`sparse_in_openvino(model)`: what OpenVINO computes of a batch with the selected experts alone."""
    openvino = pytest.importorskip("openvino", reason="the extra export is not installed")
    if library() is None:
        pytest.skip("no C++ compiler")

    def make(model):
        write_openvino_sparse(model, str(tmp_path), tmp_path / "out")
        core = openvino.Core()
        core.add_extension(str(tmp_path / "out" / "lte_openvino.so"))
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(tmp_path / "out" / "openvino_model.xml", "CPU", exact)
        return lambda batch: torch.from_numpy(
            compiled({name: value.numpy() for name, value in batch.items()})["logits"]
        )

    return make


@pytest.mark.timeout(600)  # it is compiled once
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_openvino_runs_the_selected_experts_alone(family, sparse_in_openvino, tmp_path):
    model = build(family)
    for ffn in expert_ffns(model).values():
        ffn.selector.bias.data[2] = -20.0  # no token selects this one
    poisoned = copy.deepcopy(model)
    graph = Graph(model)
    batch = inputs(graph, 3, 9, 4)
    with torch.no_grad(), lte_lightning.RouterTrace(model, torch.ones_like(batch["input_ids"])) as trace:
        expected = graph(**batch)
    unread = 0
    for ffn, scores_NE in zip(expert_ffns(poisoned).values(), trace.scores().values(), strict=True):
        for expert in (~(scores_NE > ffn.threshold).any(dim=0)).nonzero().flatten().tolist():
            rows = slice(expert * ffn.expert_size, (expert + 1) * ffn.expert_size)
            ffn.up.weight.data[rows] = torch.nan
            unread += 1
    assert unread
    run = sparse_in_openvino(poisoned)
    found = run(batch)
    assert found.isfinite().all()
    assert ((found - expected).norm() / expected.norm()).item() < 0.02  # experts are computed in bfloat16
    lte_lightning.set_mode(model, "dense")
    with torch.no_grad():
        assert ((graph(**batch) - expected).norm() / expected.norm()).item() > 0.02
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"lte_openvino.so", "openvino_model.bin"}


def test_experts_that_openvino_cannot_skip_are_refused(tmp_path):
    pytest.importorskip("openvino", reason="the extra export is not installed")
    with pytest.raises(
        UserError, match=r"the kernels do not take these experts .*; export the model with --to openvino"
    ):
        write_openvino_sparse(build("bert", selector="softmax", target_sparsity=0.5), str(tmp_path), tmp_path / "out")
    model = build("bert")
    lte_lightning.set_mode(model, "soft")
    with pytest.raises(UserError, match="the model is in mode soft, in which every expert runs"):
        write_openvino_sparse(model, str(tmp_path), tmp_path / "out")


def test_no_compiler_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="the extra export is not installed")
    if library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "nonesuch")
    with pytest.raises(UserError, match="no C\\+\\+ compiler nonesuch, which CXX names"):
        write_openvino_sparse(build("bert"), str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
