"""``lte export``: a saved model in the format of another program."""

import sys
from pathlib import Path
from typing import Literal

from lte_lightning.options import call


def main(args: list[str]) -> None:
    """Runs the command, and prints the path of the export.

    Raises:
        UserError: If an argument is wrong, a package is missing, or the format cannot represent the model.
    """
    call(export, "lte export", args, positional="folder")


def export(
    folder: str,
    to: Literal["dense", "gguf", "onnx", "openvino", "openvino-sparse"],
    out: Path | None = None,
    dtype: str = "auto",
) -> None:
    """Writes a saved LTE model for other programs.

    lte export RUN --to gguf

    dense is an ordinary Hugging Face folder of the dense function: every neuron runs. gguf is the dense function of a
    decoder for llama.cpp. onnx and openvino are folders: they compute all experts and mask the unselected ones, so the
    outputs are those of the sparse model, and nothing is faster. openvino-sparse computes the selected experts alone,
    on a CPU of this kind: for encoders and other passes over many tokens.

    Args:
        folder: A saved LTE model, a run's folder, or a hub id.
        to: The format.
        out: Path to write; it must not exist. By default beside the model, as model.gguf, model-onnx, ...
        dtype: Of a GGUF file's matrices: fp32, fp16, bf16, q8_0 or q4_0; auto is the type that they were saved in.

    Raises:
        UserError: If an option has an invalid value, a package is missing, or the format cannot represent the model.
    """
    from lte_lightning.core.model.convert import restore
    from lte_lightning.core.model.folder import find_model, read_description
    from lte_lightning.core.model.loading import from_pretrained
    from lte_lightning.data.text import load_tokenizer
    from lte_lightning.errors import UserError
    from lte_lightning.export.dense import write_dense
    from lte_lightning.export.gguf import find_target, write_gguf
    from lte_lightning.export.staging import require_free
    from lte_lightning.quiet import without_bars

    source = find_model(folder)
    description = read_description(source)
    if to != "gguf" and dtype != "auto":
        raise UserError(f"--dtype is for GGUF files, and not for {to}")
    base = Path(source) if Path(source).is_dir() else Path(Path(source).name)
    file = out or base.with_name(f"{base.resolve().name}{'.gguf' if to == 'gguf' else f'-{to}'}")
    require_free(file)
    with without_bars():
        if to == "openvino-sparse":
            from lte_lightning.export.extension import LIBRARY, write_openvino_sparse

            write_openvino_sparse(from_pretrained(source, backend="cpu", dtype="float32"), source, file)
            print(f"{to}: the selected experts in bfloat16; load {LIBRARY} with Core().add_extension", file=sys.stderr)
        elif to in ("onnx", "openvino"):
            from lte_lightning.export.graph import write_onnx, write_openvino

            model = from_pretrained(source, backend="dense-mask", dtype="float32")
            (write_onnx if to == "onnx" else write_openvino)(model, source, file)
            print(f"{to}: the function of mode {description['mode']}, by masks; float32", file=sys.stderr)
        else:
            model = restore(from_pretrained(source, backend="dense-mask").eval())
            note = "dense: every neuron of the FFNs runs"
            if to == "gguf":
                find_target(model)  # an encoder's tokenizer has no EOS token, but this is not why it is refused
                context = write_gguf(model, load_tokenizer(source, generates=True), file, dtype)
                note = f"gguf: every neuron of the FFNs runs, on texts of up to {context} tokens"
            else:
                write_dense(model, description, source, file)
            print(note, file=sys.stderr)
    print(file)
