"""The masked function as a graph: a program of torch.export, and the ONNX and OpenVINO models made of it.

A graph computes every expert, and masks the experts that a token does not select. It gives the sparse model's values,
but takes longer.
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

_EXAMPLE = {"length": 7, "decoder_length": 5}  # sizes of the traced example; a graph takes any length

EXPORTERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")  # loggers with many remarks


class Graph(nn.Module):
    """A model with named tensors as inputs and one tensor, called ``output``, as its output.

    The inputs are ``input_ids`` and ``attention_mask`` [B, T]. A model that tells the texts of a pair apart also takes
    ``token_type_ids`` [B, T]. An encoder-decoder also takes ``decoder_input_ids`` [B, U]. The output is the logits, or
    the last hidden states of a model without a head.
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
        optional = {"token_type_ids": token_type_ids, "decoder_input_ids": decoder_input_ids}
        optional = {name: value for name, value in optional.items() if value is not None}
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **optional, **self.options)
        if self.output not in outputs:
            raise UserError(f"a {type(self.model).__name__} gives no {self.output}, but {', '.join(outputs)}")
        output: torch.Tensor = outputs[self.output]
        return output

    def axes(self) -> dict[str, tuple[str, str]]:
        """Returns the names of each input's two axes. Axes with the same name have the same size."""
        return {name: ("batch", f"{'decoder_' * name.startswith('decoder')}length") for name in self.inputs}

    def example(self) -> dict[str, torch.Tensor]:
        """Returns inputs of two texts, of which the first is padded."""
        sizes = {"batch": 2, **_EXAMPLE}
        example = {
            name: torch.ones([sizes[axis] for axis in axes], dtype=torch.long) for name, axes in self.axes().items()
        }
        example["attention_mask"][0, -2:] = 0
        if "token_type_ids" in example:
            example["token_type_ids"][:, :3] = 0
        return example


def to_program(model: PreTrainedModel, backend: Backend = "dense-mask") -> ExportedProgram:
    """Exports a converted model, in its current mode, as a program of ``torch.export``.

    Batch and lengths are dynamic. `Graph` names the program's inputs; ``program.module()(**inputs)`` runs it.

    Args:
        model: A converted model. The export puts it in eval mode, and sets its backend.
        backend: The backend of the experts. All but dense-mask leave operators of this package in the program.

    Raises:
        UserError: If the model's output depends on more than texts.
    """
    if model.main_input_name != "input_ids":
        raise UserError(f"{type(model).__name__} reads {model.main_input_name}; only models of text can be exported")
    set_backend(model, backend)
    return graph_program(Graph(model.eval()))


def graph_program(graph: Graph) -> ExportedProgram:
    """Returns the program of a graph, whose model may also be a plain model."""
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
    """Writes a folder, whole or not at all, with ``model.onnx``, the configuration and the tokenizer.

    Args:
        model: A converted model in float32.
        source: The folder or hub id of its tokenizer.
        folder: The folder to write.

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
        except Exception as error:  # an unknown operator raises various errors of the exporter
            reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"PyTorch cannot write a {type(model).__name__} as ONNX: {reason}") from error
        assert onnx_program is not None  # only the older exporter returns None
        onnx_program.save(
            staging / "model.onnx", external_data=_size(model) > 2**30
        )  # a protobuf file holds at most 2 GiB
        write_rest(model, source, staging)


def write_openvino(model: PreTrainedModel, source: str, folder: Path) -> None:
    """Writes ``openvino_model.xml`` and ``.bin`` with float32 weights, and the rest of the folder as in `write_onnx`.

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
        graph: The graph, which names the inputs and the output.
        program: The graph's program.
        folder: An existing folder.
        extension: A library for the operators of this package that are in the program.
    """
    import openvino

    converted = openvino.convert_model(program, extension=None if extension is None else [str(extension)])
    for port, name in zip(converted.inputs, graph.inputs, strict=True):
        port.get_tensor().set_names({name})
    converted.outputs[0].get_tensor().set_names({graph.output})
    try:
        openvino.save_model(converted, folder / "openvino_model.xml", compress_to_fp16=False)
    except RuntimeError as error:  # on a full disk its message is of streams alone
        raise OSError(f"OpenVINO's writer failed ({error}), as it does on a full disk") from error


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
    """Names the extra to install if an import in the ``with`` block fails.

    Raises:
        UserError: If a package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f'{what} models need a package: pip install "lte-lightning[export]" ({error})') from error


@contextmanager
def _finite(model: PreTrainedModel) -> Iterator[None]:
    """Leaves out the guard against NaN in unselected experts, which would be a branch of the graph in each layer."""
    ffns = list(expert_ffns(model).values())
    for ffn in ffns:
        ffn.guards = False
    try:
        yield
    finally:
        for ffn in ffns:
            ffn.guards = True
