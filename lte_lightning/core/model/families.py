"""The page that lists the families: ``python -m lte_lightning.core.model.families > docs/families.md``."""

from lte_lightning.core.model.parts import FFN_TABLE, FfnRow

# What each family is, and checkpoints of it; only dense ones.
EXAMPLES: dict[str, tuple[str, str]] = {
    "bart": ("encoder-decoder", "facebook/bart-base, facebook/bart-large-cnn"),
    "bert": ("encoder", "google-bert/bert-base-uncased, sentence-transformers/all-MiniLM-L6-v2"),
    "bloom": ("decoder", "bigscience/bloom-560m"),
    "deberta-v2": ("encoder", "microsoft/deberta-v3-base"),
    "distilbert": ("encoder", "distilbert/distilbert-base-uncased"),
    "electra": ("encoder", "google/electra-base-discriminator"),
    "falcon": ("decoder", "tiiuae/falcon-rw-1b, tiiuae/falcon-7b"),
    "gemma": ("decoder", "google/gemma-2b"),
    "gemma2": ("decoder", "google/gemma-2-2b"),
    "gemma3_text": ("decoder", "google/gemma-3-270m, google/gemma-3-1b-pt"),
    "gpt2": ("decoder", "openai-community/gpt2-medium"),
    "gpt_neox": ("decoder", "EleutherAI/pythia-160m"),
    "llama": ("decoder", "meta-llama/Llama-2-7b-hf, HuggingFaceTB/SmolLM2-135M"),
    "mistral": ("decoder", "mistralai/Mistral-7B-v0.3"),
    "modernbert": ("encoder", "answerdotai/ModernBERT-base"),
    "mpnet": ("encoder", "microsoft/mpnet-base"),
    "opt": ("decoder", "facebook/opt-125m"),
    "phi3": ("decoder", "microsoft/Phi-3-mini-4k-instruct"),
    "qwen2": ("decoder", "Qwen/Qwen2.5-0.5B"),
    "qwen3": ("decoder", "Qwen/Qwen3-0.6B"),
    "roberta": ("encoder", "FacebookAI/roberta-base"),
    "t5": ("encoder-decoder", "google-t5/t5-small (plain), google/flan-t5-base (gated)"),
}

_PAGE = """# Families

<!-- Made by `python -m lte_lightning.core.model.families > docs/families.md` from `FFN_TABLE`. -->

`convert` cuts the FFNs of these families into experts. `model_type` is what the model's `config.json` says; names are
relative to a transformer layer.

{table}

A gated FFN is `down(activation(gate(x)) * up(x))`, a plain one `down(activation(up(x)))`. A fused projection holds gate
and up. It is two projections while the model is converted, which share its memory; a saved folder has the original one.

## What is tested

Every family, on a tiny model built from its configuration (`tests/core`), not on the checkpoints above, which are
examples:

- converted, in mode `dense`, it computes what it did (bit for bit if neurons keep their order, but for fused
  projections), in training too: the same dropout;
- `restore` and a saved folder give the plain model back, under its own names, tied embeddings tied;
- `soft` and `hard` compute equations 3 and 2 of the paper, in float32, bfloat16, float16 and under autocast;
- padding changes no figure, neither the encoder's nor the decoder's, and gradient checkpointing counts nothing twice
  (transformers has none for `mpnet`);
- decoders and encoder-decoders generate, with all experts on, the tokens of the original: greedily and with beams, with
  and without a cache, batched and alone, padded or not.

## What is refused

- Mixtures of experts (Mixtral, Qwen-MoE, OLMoE, DeepSeek, Switch, gpt-oss, ...): their FFNs are routed already.
- Quantised models and models with adapters: convert first.
- Multimodal models, `gemma3` for one: take the text model out, as below. (`Gemma3ForCausalLM.from_pretrained` on such a
  folder does not: transformers 5.23 warns, and draws random weights.)
- Every other family: describe its FFN in a row of `FFN_TABLE` (`lte_lightning/core/model/parts.py`), and add its tiny
  configuration to `tests/core/conftest.py`: that runs all of the above.

```python
whole = Gemma3ForConditionalGeneration.from_pretrained("google/gemma-3-4b-pt")
text = Gemma3ForCausalLM(whole.config.text_config)
text.model, text.lm_head = whole.model.language_model, whole.lm_head
text.save_pretrained("gemma-3-4b-text")  # and the tokenizer beside it
```
"""


def page() -> str:
    """Returns the page, in Markdown."""
    lines = ["| `model_type` | kind | FFN | up | gate | down | examples |", "|" + "---|" * 7]
    for model_type, row in sorted(FFN_TABLE.items()):
        kind, examples = EXAMPLES[model_type]
        rows = [row, row.otherwise] if row.otherwise else [row]
        cells = [" or ".join(_form(each) for each in rows)]
        for part in ("up", "gate", "down"):
            names = [name for each in rows if (name := getattr(each, part))]
            cells.append(", ".join(f"`{name}`" for name in dict.fromkeys(names)) or "-")
        lines.append(f"| `{model_type}` | {kind} | {' | '.join(cells)} | {examples} |")
    return _PAGE.format(table="\n".join(lines))


def _form(row: FfnRow) -> str:
    if row.fused:
        return "gated, fused"
    return "gated" if row.gate else "plain"


def main() -> None:
    """Prints the page."""
    print(page(), end="")


if __name__ == "__main__":
    main()
