"""llama.cpp, through the package xllamacpp: decodes after a prompt and reports its own rate."""

import copy
import json
import urllib.request
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lte_lightning.bench.decoding import Arm
from lte_lightning.bench.jobs import Job, Started
from lte_lightning.errors import UserError
from lte_lightning.export.gguf import TYPES, stored_type, write_gguf

DTYPES = {"f32": "fp32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}


def start(job: Job, dtype: str) -> Started:
    """Writes the model as a GGUF file and loads it.

    Raises:
        UserError: If llama.cpp does not support the model, or the job is not to decode a single sequence.
    """
    if job.new_tokens is None or job.batch["input_ids"].shape[0] > 1:
        raise UserError("lte bench runs it on one sequence of a decoder only (--tokens 1)")
    if job.tokenizer is None:
        raise UserError("a GGUF file needs a tokenizer, and the model's folder has none")
    file = job.folder / f"{dtype}.gguf"
    write_gguf(job.model, job.tokenizer, file, DTYPES[dtype])
    arm = llama_cpp(file, job.batch["input_ids"], job.new_tokens, job.threads)
    return Started(arm, model=lambda: rounded(job.model, dtype))


def llama_cpp(file: Path, prompt_BT: torch.Tensor, tokens: int, threads: int) -> Arm:
    """Returns an arm that decodes after a prompt of one sequence.

    Args:
        file: A GGUF file.
        prompt_BT: The prompt.
        tokens: New tokens.
        threads: Threads of llama.cpp.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = prompt_BT.shape[1] + tokens + 256, 1, threads
    params.cpuparams_batch.n_threads = threads
    params.warmup, params.verbosity = False, 0
    server = xllamacpp.Server(params)
    body = {"prompt": prompt_BT[0].tolist(), "n_predict": tokens, "temperature": 0, "ignore_eos": True}

    def arm() -> float:
        data = json.dumps(body | {"cache_prompt": False}).encode()
        request = urllib.request.Request(
            server.listening_address + "/completion", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            rate: float = json.loads(answer.read())["timings"]["predicted_per_second"]
        return rate

    return arm


def rounded(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """Returns a copy of the model with the weight values of the GGUF file.

    llama.cpp does not return the logits of a prompt, so its quality is measured on this copy. llama.cpp also rounds
    activations to 8 bits; the copy does not.
    """
    import gguf

    twin, matrix_type = copy.deepcopy(model), TYPES[DTYPES[dtype]]
    head = twin.get_output_embeddings().weight
    with torch.no_grad():
        for parameter in {id(p): p for p in twin.parameters() if p.dim() == 2}.values():
            kind = gguf.GGMLQuantizationType[stored_type(matrix_type, parameter.shape, is_head=parameter is head)]
            blocks = gguf.quants.quantize(parameter.float().numpy(), kind)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
    return twin
