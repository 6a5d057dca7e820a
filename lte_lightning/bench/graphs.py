"""OpenVINO and onnxruntime: export the model's graph, then decode with a cache or run one forward pass."""

import contextlib
import functools
import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lte_lightning.bench.decoding import Arm
from lte_lightning.bench.jobs import Job, Started, inputs_of
from lte_lightning.errors import UserError
from lte_lightning.export.cached import openvino_decoder, write_onnx_decoder
from lte_lightning.export.graph import EXPORTERS, Graph, graph_program, needs
from lte_lightning.quiet import without_remarks


def _decoding(job: Job, read: Callable[[], np.ndarray], step: Callable[[np.ndarray], np.ndarray]) -> Arm:
    """Returns an arm that decodes greedily; ``read`` starts over with the prompt, and both return logits [B, T, V]."""
    tokens = job.new_tokens or 0

    def arm() -> float:
        next_BT = read()[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(tokens):
            next_BT = step(next_BT)[:, -1:].argmax(-1)
        return len(next_BT) * tokens / (time.perf_counter() - start)

    return arm


def _passing(job: Job, run: Callable[[Mapping[str, np.ndarray]], np.ndarray]) -> Arm:
    inputs = inputs_of(job)

    def arm() -> float:
        start = time.perf_counter()
        run(inputs)
        return inputs["input_ids"].size / (time.perf_counter() - start)

    return arm


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the packages' own progress messages."""
    with contextlib.redirect_stdout(io.StringIO()), without_remarks(*EXPORTERS, "nncf", "root"):
        yield


# OpenVINO


def start_openvino(job: Job, dtype: str) -> Started:
    """Converts the model, quantises and compiles it.

    In int8, a single forward pass has quantised activations, too; decoding quantises weights alone.

    Raises:
        UserError: If OpenVINO cannot run the model.
    """
    import openvino

    file = job.folder / "openvino.xml"
    try:
        with _quiet():
            if not file.exists():
                openvino.save_model(_openvino_graph(job), file, compress_to_fp16=False)
            model = _openvino_core().read_model(file)
            if dtype in ("int8", "int4"):
                model = _openvino_rounded(job, model, dtype)
            compiled = _openvino_core().compile_model(
                model,
                "CPU",
                {
                    "INFERENCE_NUM_THREADS": job.threads,
                    "NUM_STREAMS": 1,
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_PRECISION_HINT": "f32" if dtype == "f32" else "bf16",
                },
            )
    except RuntimeError as error:
        raise UserError(f"OpenVINO cannot run the model: {' '.join(str(error).split())[:300]}") from error
    request = compiled.create_infer_request()

    def logits(batch: Mapping[str, Any]) -> np.ndarray:
        logits_BTV: np.ndarray = request.infer(dict(batch))[0]
        return logits_BTV

    if job.new_tokens is None:
        names = {name for port in compiled.inputs for name in port.get_names()}

        def run(batch: Mapping[str, Any]) -> np.ndarray:
            return logits({key: value for key, value in batch.items() if key in names})

        return Started(_passing(job, run), lambda batch: torch.from_numpy(run(_arrays(batch)).copy()))
    prompt_BT = job.batch["input_ids"].numpy()

    def feed(ids_BT: np.ndarray) -> np.ndarray:
        return logits({"input_ids": ids_BT, "beam_idx": np.arange(len(ids_BT), dtype=np.int32)})

    def anew(ids_BT: np.ndarray) -> np.ndarray:
        request.reset_state()
        return feed(ids_BT)

    arm = _decoding(job, lambda: anew(prompt_BT), feed)
    return Started(arm, lambda batch: torch.from_numpy(anew(batch["input_ids"].numpy()).copy()))


@functools.cache
def _openvino_core() -> Any:
    """Returns the one core of this process.

    Each core gives the thread a stack for its signals, and takes it away. After two cores whose lives overlap, the
    thread's stack is one that is gone: the next signal, such as Ctrl+C, is a segmentation fault (OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


def _openvino_graph(job: Job) -> Any:
    import openvino

    if job.new_tokens is not None:
        return openvino_decoder(job.model)
    graph = Graph(job.model.eval())
    converted = openvino.convert_model(graph_program(graph))
    for port, name in zip(converted.inputs, graph.inputs, strict=True):
        port.get_tensor().set_names({name})
    return converted


def _openvino_rounded(job: Job, model: Any, dtype: str) -> Any:
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    if dtype == "int4":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, ratio=1.0, group_size=32)
    if job.new_tokens is not None:
        return nncf.compress_weights(model)
    names = {name for port in model.inputs for name in port.get_names()}
    rows = [{key: value for key, value in _arrays(batch).items() if key in names} for batch in job.calibration]
    return nncf.quantize(model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER)


def _arrays(batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in batch.items() if key != "labels"}


# onnxruntime


def start_onnxruntime(job: Job, dtype: str) -> Started:
    """Converts the model, quantises its weights in int8 (and activations on the fly), and loads it.

    Raises:
        UserError: If PyTorch cannot write the model as ONNX.
    """
    import onnxruntime

    file = job.folder / "onnx" / "model.onnx"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        try:
            with _quiet():
                _write_onnx(job, file)
        except UserError:
            raise
        except Exception as error:  # the exporter raises many types, depending on the operator
            raise UserError(
                f"PyTorch cannot write the model as ONNX: {str(error).strip().splitlines()[0][:300]}"
            ) from error
    if dtype == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        rounded = file.with_name("int8.onnx")
        if not rounded.exists():
            with _quiet():
                quantize_dynamic(file, rounded, weight_type=QuantType.QInt8, use_external_data_format=True)
        file = rounded
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = {port.name for port in session.get_inputs()}
    if job.new_tokens is None:

        def run(batch: Mapping[str, np.ndarray]) -> np.ndarray:
            logits: np.ndarray = session.run(None, {key: value for key, value in batch.items() if key in names})[0]
            return logits

        return Started(_passing(job, run), lambda batch: torch.from_numpy(run(_arrays(batch))))
    shapes = {port.name: port.shape for port in session.get_inputs() if port.name != "input_ids"}
    outputs = [port.name for port in session.get_outputs()]
    state: dict[str, Any] = {}

    def feed(ids_BT: np.ndarray) -> np.ndarray:  # the cache stays where onnxruntime put it
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids_BT)
        for name, value in state.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        state.update(zip(shapes, present, strict=True))
        logits_BTV: np.ndarray = logits.numpy()
        return logits_BTV

    def anew(ids_BT: np.ndarray) -> np.ndarray:
        for name, (_, heads, _, width) in shapes.items():
            empty = np.zeros((len(ids_BT), heads, 0, width), np.float32)
            state[name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
        return feed(ids_BT)

    prompt_BT = job.batch["input_ids"].numpy()
    arm = _decoding(job, lambda: anew(prompt_BT), feed)
    return Started(arm, lambda batch: torch.from_numpy(anew(batch["input_ids"].numpy()).copy()))


def _write_onnx(job: Job, file: Path) -> None:
    if job.new_tokens is not None:
        return write_onnx_decoder(job.model, file)
    with needs("ONNX"):
        import onnxscript  # noqa: F401
    graph = Graph(job.model.eval())
    program = torch.onnx.export(
        graph_program(graph), input_names=graph.inputs, output_names=[graph.output], dynamo=True, verbose=False
    )
    assert program is not None
    program.save(file, external_data=True)
