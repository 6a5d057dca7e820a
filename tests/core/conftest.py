"""Tiny models of every family in the FFN table, with weights that hide nothing: no bias is zero, no norm is one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

WIDTH, NEURONS, EXPERT_SIZE, LAYERS, VOCAB = 32, 96, 16, 2, 64
# What most families call these sizes. transformers translates the names of those that do not.
SIZES = {
    "vocab_size": VOCAB,
    "num_labels": 3,
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
# No id that the test data use is special.
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
DROPOUT = {"hidden_dropout_prob", "attention_probs_dropout_prob"}
LLAMA = {"attention_dropout"}
FALCON = {"hidden_dropout", "attention_dropout"}

Config = Callable[[float], PreTrainedConfig]


def tiny(model_type: str, dropout: set[str], **kwargs: Any) -> Config:
    """`tiny(...)(0.1)`: the configuration in which everything named in `dropout` is 0.1."""
    return lambda p: AutoConfig.for_model(model_type, **{**SIZES, **dict.fromkeys(dropout, p), **kwargs})


def decoder(model_type: str, dropout: set[str], **kwargs: Any) -> Config:
    return tiny(model_type, dropout, use_cache=False, **IDS, **kwargs)


ENCODERS: dict[str, Config] = {
    "bert": tiny("bert", DROPOUT),
    "roberta": tiny("roberta", DROPOUT),
    "mpnet": tiny("mpnet", DROPOUT),
    "distilbert": tiny(
        "distilbert", {"dropout", "attention_dropout", "seq_classif_dropout"}, hidden_dim=NEURONS, dim=WIDTH
    ),
    "electra": tiny("electra", DROPOUT, embedding_size=WIDTH // 2),
    "deberta-v2": tiny("deberta-v2", DROPOUT, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True),
    "modernbert": tiny(
        "modernbert", {"mlp_dropout", "attention_dropout"}, mlp_bias=True, cls_token_id=2, sep_token_id=2, **IDS
    ),
}
DECODERS: dict[str, Config] = {
    "gpt2": decoder("gpt2", {"resid_pdrop", "embd_pdrop", "attn_pdrop"}, n_inner=NEURONS),
    "gpt_neox": decoder("gpt_neox", {"hidden_dropout", "attention_dropout"}),
    # Its FFN is four times as wide as the model.
    "bloom": decoder("bloom", {"hidden_dropout", "attention_dropout"}, hidden_size=NEURONS // 4),
    # As its 7B is, with one key for all heads; and nearly as its 1B is.
    "falcon": decoder("falcon", FALCON, ffn_hidden_size=NEURONS, num_key_value_heads=1),
    "falcon-biases": decoder(
        "falcon", FALCON, ffn_hidden_size=NEURONS, bias=True, parallel_attn=False, multi_query=False
    ),
    "opt": decoder("opt", {"dropout", "attention_dropout"}, ffn_dim=NEURONS, word_embed_proj_dim=WIDTH),
    "llama": decoder("llama", LLAMA),
    "llama-biases-gqa-tied": decoder(
        "llama", LLAMA, mlp_bias=True, attention_bias=True, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "mistral": decoder("mistral", LLAMA, num_key_value_heads=2, sliding_window=4),
    "qwen2": decoder("qwen2", LLAMA, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": decoder("qwen3", LLAMA, num_key_value_heads=2, head_dim=8),
    "gemma": decoder("gemma", LLAMA, num_key_value_heads=2, head_dim=8),
    "gemma2": decoder("gemma2", LLAMA, num_key_value_heads=2, head_dim=8, sliding_window=4),
    "gemma3_text": decoder("gemma3_text", LLAMA, num_key_value_heads=2, head_dim=8, sliding_window=4),
    "phi3": decoder("phi3", {"resid_pdrop", "embd_pdrop", "attention_dropout"}, num_key_value_heads=2),
}
# One layer in each stack, so that these, too, have two FFNs.
T5 = {"d_ff": NEURONS, "d_kv": 8, "num_hidden_layers": 1, "num_decoder_layers": 1, "decoder_start_token_id": 0}
ENCODER_DECODERS: dict[str, Config] = {
    "t5": decoder("t5", {"dropout_rate"}, **T5),
    "t5-gated": decoder("t5", {"dropout_rate"}, feed_forward_proj="gated-gelu", **T5),
    "bart": decoder(
        "bart",
        {"dropout", "attention_dropout", "activation_dropout"},
        num_hidden_layers=1,
        decoder_layers=1,
        decoder_attention_heads=4,
        encoder_ffn_dim=NEURONS,
        decoder_ffn_dim=NEURONS,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    ),
}
FAMILIES = ENCODERS | DECODERS | ENCODER_DECODERS
HEADS = {
    "classification": AutoModelForSequenceClassification,
    "lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}
# One family of each row of the table, for what depends on nothing else.
ROWS = ["bert", "distilbert", "modernbert", "gpt2", "gpt_neox", "falcon-biases", "bloom", "opt"]
ROWS += ["llama-biases-gqa-tied", "phi3", *ENCODER_DECODERS]
MODELS = [
    *[(family, "classification") for family in [*ENCODERS, "gpt2", "llama"]],
    *[(family, "lm") for family in DECODERS],
    *[(family, "seq2seq") for family in ENCODER_DECODERS],
]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ROWS)
def row_family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=MODELS, ids="-".join)
def family_and_head(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(params=DECODERS | ENCODER_DECODERS)
def generative_family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DECODERS)
def decoder_family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ENCODER_DECODERS)
def seq2seq_family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny_configs() -> dict[str, PreTrainedConfig]:
    return {name: config(0.1) for name, config in FAMILIES.items()}


@pytest.fixture
def row_families() -> list[str]:
    return ROWS


@pytest.fixture
def tested_as() -> dict[str, str]:
    """What the models of each type are here."""
    kinds = {"encoder": ENCODERS, "decoder": DECODERS, "encoder-decoder": ENCODER_DECODERS}
    return {config(0.1).model_type: kind for kind, configs in kinds.items() for config in configs.values()}


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    """`build(family, head, dropout)`: a model in eval mode, the same at each call; encoder-decoders have one head."""

    def build(family: str = "bert", head: str = "classification", dropout: float = 0.1) -> PreTrainedModel:
        if family in ENCODER_DECODERS:
            head = "seq2seq"
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = HEADS[head].from_config(FAMILIES[family](dropout))
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
        return model.eval()

    return build


@pytest.fixture
def batch(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    """Three texts of 7, 5 and 2 tokens, padded on the right; for a decoder behind an encoder, of 2, 5 and 7 more."""
    ids_BT = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    mask_BT = (torch.arange(7) < torch.tensor([[7], [5], [2]])).long()
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT}
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    names = [params.get(name) for name in ("family", "row_family", "seq2seq_family")]
    if {*names, *params.get("family_and_head", ())} & set(ENCODER_DECODERS):
        batch |= {"decoder_input_ids": (ids_BT + 11) % 60 + 3, "decoder_attention_mask": mask_BT.flip(0)}
    return batch


@pytest.fixture
def masks(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What a RouterTrace of the batch is given."""
    return tuple(value for key, value in batch.items() if key.endswith("attention_mask"))


@pytest.fixture
def labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Three classes, or the decoder's next tokens."""
    if "decoder_input_ids" not in batch:
        return torch.tensor([0, 1, 2])
    return batch["decoder_input_ids"].roll(-1, 1).masked_fill(batch["decoder_attention_mask"] == 0, -100)


@pytest.fixture
def scatter() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Gives the routers of a model weights with which about half of all scores lie on each side of the threshold."""
    from lte_lightning.core.model.convert import selector_parameters

    def scatter(model: PreTrainedModel) -> PreTrainedModel:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in selector_parameters(model):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    return scatter
