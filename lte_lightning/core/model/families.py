"""The table of families: each model type that `convert` takes, the place of its FFNs, and further facts.

To support another family, add a row to `FAMILIES` and its tiny config to ``tests/core/conftest.py``. Then make the page
that lists them: ``python -m lte_lightning.core.model.families > docs/families.md``.
"""

from dataclasses import dataclass, replace
from typing import Literal

from lte_lightning.errors import UserError, meant
from lte_lightning.files import markdown_table


@dataclass(frozen=True)
class FfnRow:
    """The place of a family's FFNs. Paths are relative to a transformer layer, and -1 is the last item of a list.

    Args:
        layers: Paths of the lists of layers inside ``model.base_model``: the encoder's, then the decoder's, if the
            family has both (a model may lack one of them).
        up: The up projection, D to F.
        down: The down projection, F to D.
        activation: The activation function.
        gate: The gate projection of a gated FFN, ``down(activation(gate(x)) * up(x))``. The same path as ``up`` if one
            projection holds both, the rows of the gate before those of the up projection; such a row needs ``module``.
        module: The FFN's own module, if it does nothing but the above. The expert FFN then replaces it whole. Otherwise
            the expert FFN takes the place of the up projection, and activation and down projection become identities,
            so that the dropout, residual and LayerNorm around them stay where they were.
        dropout: Dropout between activation and down projection, a part of ``module`` or a probability on the layer. The
            expert FFN then applies it.
        otherwise: The row of a layer that has no ``up``.
    """

    layers: tuple[str, ...]
    up: str
    down: str
    activation: str
    gate: str | None = None
    module: str | None = None
    dropout: str | None = None
    otherwise: "FfnRow | None" = None

    @property
    def fused(self) -> bool:
        """Whether one projection holds gate and up."""
        return self.gate == self.up


@dataclass(frozen=True)
class Family:
    """The facts about a Hugging Face ``model_type``.

    Args:
        kind: How its tokens see each other. In an encoder all do; in a decoder a token sees only those before it.
        row: The place of its FFNs.
        examples: Dense checkpoints of the family.
        first_token: Whether its classification head reads the first token alone, so that the last layer's other tokens
            change no result.
    """

    kind: Literal["encoder", "decoder", "encoder-decoder"]
    row: FfnRow
    examples: str
    first_token: bool = False


_BERT = FfnRow(("encoder.layer",), "intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")
_LLAMA = FfnRow(("layers",), "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", gate="mlp.gate_proj", module="mlp")
_FALCON = FfnRow(("h",), "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.act", module="mlp")
_T5 = FfnRow(
    ("encoder.block", "decoder.block"),
    "layer.-1.DenseReluDense.wi",
    "layer.-1.DenseReluDense.wo",
    "layer.-1.DenseReluDense.act",
    module="layer.-1.DenseReluDense",
    dropout="layer.-1.DenseReluDense.dropout",
)
_T5_GATED = replace(_T5, up="layer.-1.DenseReluDense.wi_1", gate="layer.-1.DenseReluDense.wi_0")

FAMILIES: dict[str, Family] = {
    "bart": Family(
        "encoder-decoder",
        FfnRow(("encoder.layers", "decoder.layers"), "fc1", "fc2", "activation_fn", dropout="activation_dropout"),
        "facebook/bart-base, facebook/bart-large-cnn",
    ),
    "bert": Family(
        "encoder", _BERT, "google-bert/bert-base-uncased, sentence-transformers/all-MiniLM-L6-v2", first_token=True
    ),
    "bloom": Family(
        "decoder", FfnRow(("h",), "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.gelu_impl"), "bigscience/bloom-560m"
    ),
    "deberta-v2": Family("encoder", _BERT, "microsoft/deberta-v3-base", first_token=True),
    "distilbert": Family(
        "encoder",
        FfnRow(("transformer.layer",), "ffn.lin1", "ffn.lin2", "ffn.activation"),
        "distilbert/distilbert-base-uncased",
        first_token=True,
    ),
    "electra": Family("encoder", _BERT, "google/electra-base-discriminator", first_token=True),
    "falcon": Family("decoder", _FALCON, "tiiuae/falcon-rw-1b, tiiuae/falcon-7b"),
    "gemma": Family("decoder", _LLAMA, "google/gemma-2b"),
    "gemma2": Family("decoder", _LLAMA, "google/gemma-2-2b"),
    "gemma3_text": Family("decoder", _LLAMA, "google/gemma-3-270m, google/gemma-3-1b-pt"),
    "gpt2": Family("decoder", FfnRow(("h",), "mlp.c_fc", "mlp.c_proj", "mlp.act"), "openai-community/gpt2-medium"),
    "gpt_neox": Family("decoder", replace(_FALCON, layers=("layers",)), "EleutherAI/pythia-160m"),
    "llama": Family("decoder", _LLAMA, "meta-llama/Llama-2-7b-hf, HuggingFaceTB/SmolLM2-135M"),
    "mistral": Family("decoder", _LLAMA, "mistralai/Mistral-7B-v0.3"),
    "modernbert": Family(
        "encoder",
        FfnRow(("layers",), "mlp.Wi", "mlp.Wo", "mlp.act", gate="mlp.Wi", module="mlp", dropout="mlp.drop"),
        "answerdotai/ModernBERT-base",
    ),
    "mpnet": Family("encoder", _BERT, "microsoft/mpnet-base", first_token=True),
    "opt": Family("decoder", FfnRow(("decoder.layers",), "fc1", "fc2", "activation_fn"), "facebook/opt-125m"),
    "phi3": Family(
        "decoder",
        FfnRow(
            ("layers",), "mlp.gate_up_proj", "mlp.down_proj", "mlp.activation_fn", gate="mlp.gate_up_proj", module="mlp"
        ),
        "microsoft/Phi-3-mini-4k-instruct",
    ),
    "qwen2": Family("decoder", _LLAMA, "Qwen/Qwen2.5-0.5B"),
    "qwen3": Family("decoder", _LLAMA, "Qwen/Qwen3-0.6B"),
    "roberta": Family("encoder", _BERT, "FacebookAI/roberta-base", first_token=True),
    "t5": Family(
        "encoder-decoder", replace(_T5, otherwise=_T5_GATED), "google-t5/t5-small (plain), google/flan-t5-base (gated)"
    ),
}


class UnsupportedModelError(UserError):
    """Expert FFNs do not support the model's family, or one of its parts."""


def find_row(model_type: str) -> FfnRow:
    """Returns the table's row of a Hugging Face ``model_type``.

    Raises:
        UnsupportedModelError: If there is none.
    """
    if model_type not in FAMILIES:
        hint = meant(model_type, FAMILIES, " Did you mean {!r}?")
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported; known are {', '.join(sorted(FAMILIES))}.{hint} "
            "To add one, describe its FFN in a row of FAMILIES (lte_lightning/core/model/families.py)."
        )
    return FAMILIES[model_type].row


def reads_first_token(model_type: str | None) -> bool:
    """Says whether a family's classification head reads the first token alone; False if it is unknown."""
    family = FAMILIES.get(model_type or "")
    return family is not None and family.first_token


_PAGE = """# Families

<!-- Made by `python -m lte_lightning.core.model.families > docs/families.md` from `FAMILIES`. -->

`convert` cuts the FFNs of these families into experts. `model_type` is an entry of the model's `config.json`. Names
of projections are relative to a transformer layer.

{table}

A gated FFN is `down(activation(gate(x)) * up(x))`, a plain one `down(activation(up(x)))`. A fused projection holds gate
and up. In a converted model it is two projections, which share its memory. A saved folder has the original projection.

## What is tested

The tests build a tiny model of every family from its configuration (`tests/core`). They do not use the checkpoints
above, which are examples. They check these properties:

- A converted model in mode `dense` computes what the original did, in training too, with the same dropout. The results
  are equal bit for bit if the neurons keep their order and the projections are not fused.
- `restore` and a saved folder give the plain model back, under its own names and with its tied embeddings.
- `soft` and `hard` compute equations 3 and 2 of the paper, in float32, bfloat16, float16 and under autocast.
- Padding changes no result of an encoder or a decoder. Gradient checkpointing counts nothing twice (transformers has
  none for `mpnet`).
- Decoders and encoder-decoders with all experts on generate the tokens of the original: greedily and with beams, with
  and without a cache, batched and alone, padded or not.

## What is refused

- `convert` refuses mixtures of experts (Mixtral, Qwen-MoE, OLMoE, DeepSeek, Switch, gpt-oss, ...). Their FFNs have
  routers already.
- It refuses quantised models and models with adapters. Convert the model first, then quantise it or add adapters.
- It refuses multimodal models such as `gemma3`. Take the text model out, as shown below.
  (`Gemma3ForCausalLM.from_pretrained` does not do this: transformers 5.23 warns and draws random weights.)
- It refuses every other family. To add one, describe its FFN in a row of `FAMILIES`
  (`lte_lightning/core/model/families.py`), and add its tiny configuration to `tests/core/conftest.py`. The tests above
  then run on it.

```python
whole = Gemma3ForConditionalGeneration.from_pretrained("google/gemma-3-4b-pt")
text = Gemma3ForCausalLM(whole.config.text_config)
text.model, text.lm_head = whole.model.language_model, whole.lm_head
text.save_pretrained("gemma-3-4b-text")  # and the tokenizer beside it
```
"""


def page() -> str:
    """Returns the page, in Markdown."""
    table = []
    for model_type, family in sorted(FAMILIES.items()):
        row = family.row
        rows = [row, row.otherwise] if row.otherwise else [row]
        cells = [" or ".join(_form(each) for each in rows)]
        for part in ("up", "gate", "down"):
            names = [name for each in rows if (name := getattr(each, part))]
            cells.append(", ".join(f"`{name}`" for name in dict.fromkeys(names)) or "-")
        table.append([f"`{model_type}`", family.kind, *cells, family.examples])
    heads = ["`model_type`", "kind", "FFN", "up", "gate", "down", "examples"]
    return _PAGE.format(table=markdown_table(heads, table).rstrip())


def _form(row: FfnRow) -> str:
    if row.fused:
        return "gated, fused"
    return "gated" if row.gate else "plain"


def main() -> None:
    """Prints the page."""
    print(page(), end="")


if __name__ == "__main__":
    main()
