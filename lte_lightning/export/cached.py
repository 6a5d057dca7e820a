"""A plain decoder as a graph with a cache, which OpenVINO and onnxruntime run token by token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lte_lightning.errors import UserError
from lte_lightning.export.graph import EXPORTERS, needs
from lte_lightning.quiet import without_remarks

_LONGEST = 2**20


class CachedGraph(nn.Module):
    """A decoder that takes its cache as an input and returns it as an output.

    The inputs are ``input_ids`` [B, T] and ``past``: keys and values of each layer, [B, heads, P, width of a head]. The
    outputs are the logits [B, T, V], and the keys and values, extended by those of the T tokens.

    Args:
        model: A plain decoder with a language model head.

    Raises:
        UserError: If the model keeps another kind of cache, for example that of a sliding window.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            seen = model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True).past_key_values
        if not isinstance(seen, DynamicCache) or any(type(layer) is not DynamicLayer for layer in seen.layers):
            raise UserError(
                f"{type(model).__name__} with this configuration uses a cache other than the keys and values of all "
                "tokens (for example a sliding window), which cannot be exported"
            )
        # The number and width of heads, for keys and values in turn.
        kept: list[Any] = [t for layer in list[Any](seen.layers) for t in (layer.keys, layer.values)]
        self.shapes: list[tuple[int, int]] = [(t.shape[1], t.shape[3]) for t in kept]

    def forward(self, input_ids: torch.Tensor, past: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Returns the logits, then the keys and values of each layer."""
        cache: Any = DynamicCache(config=self.model.config)
        for layer, key, value in zip(cache.layers, past[::2], past[1::2], strict=True):
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
        outputs = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        present = [t for layer in outputs.past_key_values.layers for t in (layer.keys, layer.values)]
        return (outputs.logits, *present)

    def program(self) -> ExportedProgram:
        """Exports the graph as a program of ``torch.export`` with dynamic batch and lengths."""
        ids_BT = torch.ones(2, 3, dtype=torch.long)
        past = [torch.zeros(2, heads, 5, width, dtype=self.model.dtype) for heads, width in self.shapes]
        batch, length, past_length = Dim("batch"), Dim("length", max=_LONGEST), Dim("past", max=_LONGEST)
        shapes: Any = {
            "input_ids": {0: batch, 1: length},
            "past": [{0: batch, 2: past_length} for _ in past],
        }
        with torch.no_grad(), without_remarks(*EXPORTERS):
            return torch.export.export(self, (ids_BT, past), dynamic_shapes=shapes, strict=False)


def openvino_decoder(model: PreTrainedModel) -> Any:
    """Returns an ``openvino.Model`` that keeps its cache as a state.

    Its inputs are ``input_ids`` [B, T] and ``beam_idx`` [B], the sequence that each sequence continues. OpenVINO's own
    pipelines feed the same inputs. Its output is ``logits`` [B, T, V]. ``reset_state`` of a request empties the cache.

    Args:
        model: A plain decoder in float32.

    Raises:
        UserError: If OpenVINO is missing, or the model does not become a graph.
    """
    with needs("OpenVINO"):
        import openvino
        from openvino import opset13 as ops
        from openvino._offline_transformations import apply_make_stateful_transformation
    graph = CachedGraph(model.eval())
    program = graph.program()
    with without_remarks(*EXPORTERS):
        converted = openvino.convert_model(program)
    ids, *past = converted.inputs
    logits, *present = converted.outputs
    ids.get_tensor().set_names({"input_ids"})
    logits.get_tensor().set_names({"logits"})
    for i, (before, after, (heads, width)) in enumerate(zip(past, present, graph.shapes, strict=True)):
        before.get_tensor().set_names({f"past.{i}"})
        after.get_tensor().set_names({f"present.{i}"})
        before.get_node().set_partial_shape(openvino.PartialShape([-1, heads, -1, width]))
    beam = ops.parameter([-1], openvino.Type.i32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    converted.add_parameters([beam])
    for before in past:  # OpenVINO knows this pattern and fuses it with the attention
        readers = list(before.get_target_inputs())
        chosen = ops.gather(before, beam, ops.constant(0)).output(0)
        for reader in readers:
            reader.replace_source_output(chosen)
    converted.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(converted, {f"past.{i}": f"present.{i}" for i in range(len(past))})
    batch = ops.gather(ops.shape_of(ids.get_node(), output_type="i64"), ops.constant([0]), ops.constant(0))
    for node in converted.get_ops():
        if node.get_type_name() == "ReadValue":  # begin with an empty cache for the batch's sequences
            _, heads, _, width = node.get_output_partial_shape(0)
            sizes = ops.constant([heads.get_length(), 0, width.get_length()], dtype=openvino.Type.i64)
            empty = ops.broadcast(ops.constant(0.0, dtype=openvino.Type.f32), ops.concat([batch, sizes], axis=0))
            node.set_arguments([empty])
    converted.validate_nodes_and_infer_types()
    return converted


def write_onnx_decoder(model: PreTrainedModel, file: Path) -> None:
    """Writes an ONNX model with inputs ``input_ids`` and ``past_0`` ..., outputs ``logits`` and ``present_0`` ...

    The arguments and errors are those of `openvino_decoder`.
    """
    with needs("ONNX"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    graph = CachedGraph(model.eval())
    program, count = graph.program(), len(graph.shapes)
    with without_remarks(*EXPORTERS):
        onnx_program = torch.onnx.export(
            program,
            input_names=["input_ids", *(f"past_{i}" for i in range(count))],
            output_names=["logits", *(f"present_{i}" for i in range(count))],
            dynamo=True,
            verbose=False,
        )
    assert onnx_program is not None  # only the older exporter returns None
    onnx_program.save(file, external_data=True)
