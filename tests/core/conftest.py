"""Tiny models of every family in the FFN table, with weights that hide nothing: no bias is zero, no norm is one."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

WIDTH, NEURONS, EXPERT_SIZE, LAYERS, VOCAB = 32, 96, 16, 2, 64
COMMON = {"vocab_size": VOCAB, "num_labels": 3}


def bert_like(config_class: type[PreTrainedConfig]) -> Callable[[float], PreTrainedConfig]:
    return lambda dropout: config_class(
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=40,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **COMMON,
    )


def distilbert(dropout: float) -> PreTrainedConfig:
    return DistilBertConfig(
        dim=WIDTH,
        hidden_dim=NEURONS,
        n_layers=LAYERS,
        n_heads=4,
        max_position_embeddings=40,
        dropout=dropout,
        attention_dropout=dropout,
        seq_classif_dropout=dropout,
        **COMMON,
    )


def gpt2(dropout: float) -> PreTrainedConfig:
    return GPT2Config(
        n_embd=WIDTH,
        n_inner=NEURONS,
        n_layer=LAYERS,
        n_head=4,
        n_positions=40,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=0,
        **COMMON,
    )


def llama(**kwargs: object) -> Callable[[float], PreTrainedConfig]:
    return lambda dropout: LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=40,
        attention_dropout=dropout,
        use_cache=False,
        pad_token_id=0,
        **COMMON,
        **kwargs,
    )


FAMILIES: dict[str, Callable[[float], PreTrainedConfig]] = {
    "bert": bert_like(BertConfig),
    "roberta": bert_like(RobertaConfig),
    "mpnet": bert_like(MPNetConfig),
    "distilbert": distilbert,
    "gpt2": gpt2,
    "llama": llama(),
    "llama-biases-gqa-tied": llama(mlp_bias=True, attention_bias=True, num_key_value_heads=2, tie_word_embeddings=True),
}
HEADS = {"classification": AutoModelForSequenceClassification, "lm": AutoModelForCausalLM}
DECODERS = [family for family in FAMILIES if family.startswith(("gpt2", "llama"))]
MODELS = [(family, "classification") for family in FAMILIES] + [(family, "lm") for family in DECODERS]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=MODELS, ids="-".join)
def family_and_head(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def tiny_configs() -> dict[str, PreTrainedConfig]:
    return {name: config(0.1) for name, config in FAMILIES.items()}


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    """`build(family, head, dropout)`: a model in eval mode, the same at each call."""

    def build(family: str = "bert", head: str = "classification", dropout: float = 0.1) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = HEADS[head].from_config(FAMILIES[family](dropout))
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
        return model.eval()

    return build


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three texts of 7, 5 and 2 tokens, padded on the right; no id is special in any family."""
    ids_BT = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    mask_BT = (torch.arange(7) < torch.tensor([[7], [5], [2]])).long()
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


@pytest.fixture
def scatter() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Gives the routers of a model weights with which about half of all scores lie on each side of the threshold."""
    from lte_lightning.core.convert import selector_parameters

    def scatter(model: PreTrainedModel) -> PreTrainedModel:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in selector_parameters(model):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    return scatter
