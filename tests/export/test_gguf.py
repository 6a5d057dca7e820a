"""GGUF files: llama.cpp writes the tokens of the dense model, and what it would compute otherwise is refused."""

import json
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

import lte_lightning
from lte_lightning.bench.llama_cpp import rounded
from lte_lightning.errors import UserError
from lte_lightning.export.gguf import TARGETS, stored_type, write_gguf

gguf = pytest.importorskip("gguf", reason="the extra export is not installed")

SIZES = {
    "vocab_size": 330,  # more than the tokenizer has
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_key_value_heads": 2,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": GEMMA,
    "gemma2": GEMMA | {"sliding_window": 8},
    "gemma3_text": GEMMA | {"sliding_window": 8, "num_hidden_layers": 6},
    "gpt2": {"n_inner": 96},
    "llama": {},
    "llama biases, tied": {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True},
    "llama of version 3": {"rope_parameters": LLAMA_3},
    "llama stretched": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
}


def build(family: str = "llama", auto_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    config = AutoConfig.for_model(family.split()[0], **SIZES | FAMILIES.get(family, {}) | options)
    torch.manual_seed(0)
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


class LlamaCpp:
    """llama.cpp's server on a file."""

    def __init__(self, file: Any) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 256, 1, 1, False
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def tokens(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def write(self, ids: list[int], count: int) -> list[int]:
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return self.post("/completion", return_tokens=True, **body)["tokens"]


@pytest.fixture
def llama_cpp(tmp_path, make_lm_tokenizer) -> Callable[..., LlamaCpp]:
    """`llama_cpp(model, tokenizer, dtype)`: both as a GGUF file, in llama.cpp."""
    pytest.importorskip("xllamacpp", reason="llama.cpp (xllamacpp) is not installed")

    def start(model: Any, tokenizer: Any = None, dtype: str = "auto") -> LlamaCpp:
        write_gguf(model, tokenizer or make_lm_tokenizer(), tmp_path / "model.gguf", dtype)
        return LlamaCpp(tmp_path / "model.gguf")

    return start


def assert_most_probable(model: Any, ids: list[int], written: list[int], slack: float) -> None:
    """Each token is the model's most probable one, but for the one that ends a text; `slack` is in logits."""
    with torch.no_grad():
        logits = model(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1]
    logits[:, 2] = -torch.inf
    behind = logits.max(dim=1).values - logits[torch.arange(len(written)), written]
    assert behind.max() < slack


def test_all_families_are_tested():
    assert {name.split()[0] for name in FAMILIES} == TARGETS.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_writes_what_the_dense_model_does(family, llama_cpp):
    plain = build(family)
    converted = lte_lightning.convert(build(family), lte_lightning.LteConfig(expert_size=8), progress=False)
    ids = torch.randint(3, 300, (40,)).tolist()
    written = llama_cpp(lte_lightning.restore(converted)).write(ids, 24)
    assert len(written) == 24
    assert len(set(written)) > 1 or family == "gemma"
    assert_most_probable(plain, ids, written, 0.02)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "q8_0", "q4_0"])
def test_other_types_are_near(dtype, llama_cpp, tmp_path):
    model = build()
    ids = torch.randint(3, 300, (40,)).tolist()
    written = llama_cpp(model, dtype=dtype).write(ids, 8)
    assert_most_probable(model, ids, written, 1.5 if dtype == "q4_0" else 0.2)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    expected = {"fp16": "F16"}.get(dtype, dtype.upper())
    assert types.pop("output.weight") == ("Q8_0" if dtype == "q4_0" else expected)
    assert set(types.values()) == {"F32", expected}


@pytest.mark.parametrize(("width", "head"), [(576, "Q8_0"), (512, "Q4_0"), (48, "F16")])
def test_the_head_of_a_4_bit_file_has_the_bits_that_llama_quantize_gives_it(width, head):
    assert stored_type("Q4_0", torch.Size([330, width]), is_head=True) == head
    assert stored_type("Q4_0", torch.Size([330, width]), is_head=False) == ("F16" if width == 48 else "Q4_0")


def test_quality_is_measured_on_the_weights_of_the_file(tmp_path, make_lm_tokenizer):
    model = build("llama biases, tied")
    write_gguf(model, make_lm_tokenizer(), tmp_path / "model.gguf", "q4_0")
    twin = rounded(model, "int4").state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, key in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
    }.items():
        stored = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert torch.from_numpy(stored).equal(twin[key])


def test_the_file_says_what_it_is(tmp_path, make_lm_tokenizer):
    model, tokenizer = build("llama biases, tied").bfloat16(), make_lm_tokenizer(chat=True, bos_token="<s>")
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    assert fields["llama.context_length"] == 256
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert len(fields["tokenizer.ggml.tokens"]) == 330
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors  # tied
    bits = torch.from_numpy(tensors["blk.1.ffn_down.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(bits, model.model.layers[1].mlp.down_proj.weight)


TEXTS = [
    "The cat's 1234 fish --- are 42!",
    "  two  spaces\n\n\tand a tab",
    "Ünïcödé 日本語",
    "<|user|>a cat<|assistant|>",
    "A",
]


@pytest.mark.parametrize("step", ["gpt2", "digits", "llama 3", "qwen"])
def test_texts_are_cut_as_by_the_tokenizer(step, llama_cpp, make_lm_tokenizer):
    tokenizer = make_lm_tokenizer(bos_token="<s>" if step == "llama 3" else None)
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = r"\p{N}{1,3}" if step == "llama 3" else r"\p{N}"
    regex = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    cut = pre_tokenizers.Split(Regex(regex), "isolated")
    backend = tokenizer.backend_tokenizer
    if step == "digits":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif step != "gpt2":
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_alone])
        backend.model.ignore_merges = step == "llama 3"
    file = llama_cpp(build(), tokenizer)
    assert [file.tokens(text) for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_s_texts_are_cut_as_by_the_tokenizer(prefix, llama_cpp):
    pieces = [
        "▁",
        "a",
        "c",
        "t",
        "f",
        "i",
        "s",
        "h",
        "ca",
        "cat",
        "▁cat",
        "fi",
        "sh",
        "fish",
        "▁fish",
        "▁a",
        "at",
        "▁c",
    ]
    merges = [("c", "a"), ("ca", "t"), ("▁", "cat"), ("f", "i"), ("s", "h"), ("fi", "sh"), ("▁", "fish"), ("▁", "a")]
    merges += [("a", "t"), ("▁", "c")]
    known = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    model = models.BPE({piece: i for i, piece in enumerate(known)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    file = llama_cpp(build(), tokenizer)
    texts = ["a cat fish", "catfish  at cat", "Zürich cats\n"]
    assert [file.tokens(text) for text in texts] == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("opt", {}, "cannot write a opt model as GGUF; supported: gemma, gemma2, .*qwen3"),
        ("llama", {"hidden_act": "relu"}, "activation relu, and llama.cpp computes silu in a llama model"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type 'dynamic'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window is True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; .* only False"),
        ("gemma2", {"query_pre_attn_scalar": 9}, "query_pre_attn_scalar is 9; .* only 8"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("llama", {"vocab_size": 100}, r"has a token \d+, and the model's vocabulary ends at 99"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, options, message, tmp_path, make_lm_tokenizer):
    with pytest.raises(UserError, match=message):
        write_gguf(build(family, **options), make_lm_tokenizer(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_window_that_llama_cpp_does_not_know_limits_the_texts(tmp_path, make_lm_tokenizer):
    assert write_gguf(build("mistral", sliding_window=16), make_lm_tokenizer(), tmp_path / "model.gguf") == 16
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["llama.context_length"].contents() == 16
    assert write_gguf(build("gemma2"), make_lm_tokenizer(), tmp_path / "gemma.gguf") == 256


def test_other_refusals(tmp_path, make_lm_tokenizer, monkeypatch):
    file, tokenizer = tmp_path / "model.gguf", make_lm_tokenizer()

    def refused(message: str, model: Any, tokenizer: Any = tokenizer, dtype: str = "auto") -> None:
        with pytest.raises(UserError, match=message):
            write_gguf(model, tokenizer, file, dtype)
        assert not file.exists()

    refused("LlamaForSequenceClassification", build(auto_class=AutoModelForSequenceClassification))
    converted = lte_lightning.convert(build(), lte_lightning.LteConfig(expert_size=8), progress=False)
    refused("restore", converted)
    refused("unknown dtype 'q9'; a GGUF file has fp32", build(), dtype="q9")
    refused("torch.float64", build().double())
    cutter = make_lm_tokenizer()
    cutter.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    refused("splits texts by .*Whitespace.*; supported are the splits of gpt-2, smollm", build(), cutter)
    lower = make_lm_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    refused("normalises texts by Lowercase", build(), lower)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    refused("is a WordLevel model", build(), words)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        refused(r'need the package gguf: pip install "lte-lightning\[export\]"', build())
    file.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_gguf(build(), tokenizer, file)
    assert file.read_text() == "mine"
