"""The masked function as a graph: torch.export's program, and ONNX and OpenVINO models made of it.

A graph computes every expert, and masks those that a token does not select: the values are those of the sparse model,
the time is not.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import AutoTokenizer, PreTrainedModel

from lte_lightning.core.model.backend import set_backend
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.folder import find
from lte_lightning.errors import UserError
from lte_lightning.export.staging import staged
from lte_lightning.kernels.dispatch import Backend
from lte_lightning.quiet import without_remarks

_EXAMPLE = {"length": 7, "decoder_length": 5}  # of the text with which the graph is traced; all lengths are open

EXPORTERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")  # which say much of themselves


class Graph(nn.Module):
    """A model with tensors as inputs, by name, and one tensor as its output, called ``output``.

    The inputs are ``input_ids`` and ``attention_mask`` [B, T], ``token_type_ids`` [B, T] where the model tells texts of
    a pair apart, and ``decoder_input_ids`` [B, U] of an encoder-decoder. The output is the logits, or the last hidden
    states of a model without a head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        has_head = re.search("For[A-Z]|Head", type(model).__name__)
        self.output = "logits" if has_head else "last_hidden_state"
        accepted = inspect.signature(model.forward).parameters
        self.inputs = ["input_ids", "attention_mask"]
        if "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 1) > 1:
            self.inputs.append("token_type_ids")
        if model.config.is_encoder_decoder:
            self.inputs.append("decoder_input_ids")
        self.options = {"use_cache": False} if "use_cache" in accepted else {}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the output."""
        given = {"token_type_ids": token_type_ids, "decoder_input_ids": decoder_input_ids}
        given = {name: value for name, value in given.items() if value is not None}
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **given, **self.options)
        if self.output not in found:
            raise UserError(f"a {type(self.model).__name__} gives no {self.output}, but {', '.join(found)}")
        output: torch.Tensor = found[self.output]
        return output

    def axes(self) -> dict[str, tuple[str, str]]:
        """Returns the names of the inputs' two axes; the same name is the same size."""
        return {name: ("batch", f"{'decoder_' * name.startswith('decoder')}length") for name in self.inputs}

    def example(self) -> dict[str, torch.Tensor]:
        """Returns inputs of two texts, the first padded."""
        sizes = {"batch": 2, **_EXAMPLE}
        example = {
            name: torch.ones([sizes[axis] for axis in axes], dtype=torch.long) for name, axes in self.axes().items()
        }
        example["attention_mask"][0, -2:] = 0
        if "token_type_ids" in example:
            example["token_type_ids"][:, :3] = 0
        return example


def to_program(model: PreTrainedModel, backend: Backend = "dense-mask") -> ExportedProgram:
    """Returns a converted model as a program of ``torch.export``, in the mode that it is in.

    Batch and lengths are open. The program's inputs are named, see `Graph`; ``program.module()(**inputs)`` runs it.

    Args:
        model: A converted model. It is put in eval mode, and on the backend.
        backend: What computes the experts. Others than dense-mask leave operators of ours in the program.

    Raises:
        UserError: If its output depends on more than texts.
    """
    if model.main_input_name != "input_ids":
        raise UserError(
            f"a {type(model).__name__} reads {model.main_input_name}, and graphs are made of models of text"
        )
    set_backend(model, backend)
    return graph_program(Graph(model.eval()))


def graph_program(graph: Graph) -> ExportedProgram:
    """Returns the program of a graph, whose model may be a plain one as well."""
    model = graph.model
    limit = getattr(model.config, "max_position_embeddings", None) or 2**20
    dims = {
        "batch": Dim("batch"),
        "length": Dim("length", max=limit),
        "decoder_length": Dim("decoder_length", max=limit),
    }
    shapes = {name: {i: dims[axis] for i, axis in enumerate(axes)} for name, axes in graph.axes().items()}
    with torch.no_grad(), _finite(model), without_remarks(*EXPORTERS):
        return torch.export.export(graph, (), graph.example(), dynamic_shapes=shapes, strict=False)


def write_onnx(model: PreTrainedModel, source: str, folder: Path) -> None:
    """Writes ``model.onnx``, and beside it the configuration and the tokenizer; a folder, whole or not at all.

    Args:
        model: A converted model in float32.
        source: Where its tokenizer is from.
        folder: Where to.

    Raises:
        UserError: If a package is missing, or PyTorch cannot translate the model.
    """
    with needs("ONNX"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    graph, program = Graph(model), to_program(model)
    with staged(folder) as staging, without_remarks(*EXPORTERS):
        staging.mkdir()
        try:
            onnx_program = torch.onnx.export(
                program, output_names=[graph.output], dynamic_shapes=_named(graph), verbose=False, dynamo=True
            )
        except Exception as error:  # the exporter's own, of whatever operator it stumbles over
            reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"PyTorch cannot write a {type(model).__name__} as ONNX: {reason}") from error
        assert onnx_program is not None  # it is None for the older exporter alone
        onnx_program.save(
            staging / "model.onnx", external_data=_size(model) > 2**30
        )  # a file of protobuf ends at 2 GiB
        write_rest(model, source, staging)


def write_openvino(model: PreTrainedModel, source: str, folder: Path) -> None:
    """Writes ``openvino_model.xml`` and ``.bin``, weights in float32, and the rest as `write_onnx` does.

    The arguments and errors are those of `write_onnx`.
    """
    with needs("OpenVINO"):
        import openvino  # noqa: F401
    graph, program = Graph(model), to_program(model)
    with staged(folder) as staging, without_remarks(*EXPORTERS):
        staging.mkdir()
        save_openvino(graph, program, staging)
        write_rest(model, source, staging)


def save_openvino(graph: Graph, program: ExportedProgram, folder: Path, extension: Path | None = None) -> None:
    """Writes ``openvino_model.xml`` and ``.bin`` into a folder.

    Args:
        graph: Whose inputs and output it has.
        program: Of the graph.
        folder: Where to.
        extension: A library with the operators of ours that are in the program.
    """
    import openvino

    converted = openvino.convert_model(program, extension=None if extension is None else [str(extension)])
    for port, name in zip(converted.inputs, graph.inputs, strict=True):
        port.get_tensor().set_names({name})
    converted.outputs[0].get_tensor().set_names({graph.output})
    openvino.save_model(converted, folder / "openvino_model.xml", compress_to_fp16=False)


def _named(graph: Graph) -> dict[str, dict[int, str]]:
    return {name: dict(enumerate(axes)) for name, axes in graph.axes().items()}


def write_rest(model: PreTrainedModel, source: str, folder: Path) -> None:
    """Writes the configuration, and the tokenizer if there is one."""
    model.config.save_pretrained(folder)
    if any(find(source, name) for name in ("tokenizer.json", "tokenizer_config.json")):
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _size(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@contextmanager
def needs(what: str) -> Iterator[None]:
    """Says which extra a package belongs to that is imported within.

    Raises:
        UserError: If it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f'{what} models need a package: pip install "lte-lightning[export]" ({error})') from error


@contextmanager
def _finite(model: PreTrainedModel) -> Iterator[None]:
    """Leaves out what guards against NaN in experts that were not selected: a branch of the graph in each layer."""
    ffns = list(expert_ffns(model).values())
    for ffn in ffns:
        ffn.guards = False
    try:
        yield
    finally:
        for ffn in ffns:
            ffn.guards = True
