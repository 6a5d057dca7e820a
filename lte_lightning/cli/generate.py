"""``lte generate``: streams a language model's text to the shell, with its speed and its sparsity."""

import math
import os
import sys
from contextlib import nullcontext

from lte_lightning.errors import UserError
from lte_lightning.options import call


def main(args: list[str]) -> None:
    """Runs the command. The text goes to standard output, speed and sparsity to standard error.

    Raises:
        UserError: If an argument is wrong; no weights are loaded then.
    """
    try:
        call(generate, "lte generate", args, positional="folder")
    except BrokenPipeError:  # a reader such as `head` closed the pipe; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # a shell's code for SIGPIPE


def generate(
    folder: str,
    prompt: str = "-",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    backend: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    device: str = "auto",
    chat: bool = False,
    dense: bool = False,
    sparsity: float | None = None,
    threads: int | None = None,
) -> None:
    """Continues a prompt in the mode that the model was saved in, and shows tokens per second and sparsity.

    lte generate RUN --prompt "Once upon a time"

    Args:
        folder: A saved LTE model, a run's folder, or a plain model's folder or hub id.
        prompt: The text to continue; - is standard input.
        max_new_tokens: Most tokens to write; the model may end earlier.
        temperature: Temperature of sampling. 0 always takes the most probable token.
        backend: auto, dense-mask, reference, cpu or triton.
        dtype: Of the weights: bf16, fp16, fp32; auto is the type that they were saved in.
        quantize: int8 or int4: round the weights, to decode faster on a CPU.
        device: cpu, cuda or cuda:1; auto takes a CUDA device where there is one, and no quantised weights.
        chat: Send the prompt as a user's message, in the tokenizer's chat template.
        dense: Write a second time with every neuron, to compare.
        sparsity: FFN sparsity of a model calibrated by lte calibrate. By default the saved one.
        threads: torch's threads. By default torch's own choice.

    Raises:
        UserError: If an option has an invalid value, or the folder holds no model that writes text.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}; it must be at least 1")
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}; it must be at least 1")
    if not 0.0 <= temperature < math.inf:  # nor NaN
        raise UserError(f"--temperature is {temperature}; it must be 0 (greedy) or a positive number, like 0.7")
    import torch

    from lte_lightning.bench.machine import find_backend, find_device
    from lte_lightning.cli.cost_tables import DTYPES
    from lte_lightning.cli.write_text import choose_tokens, encode, find_source, used_sparsity, write
    from lte_lightning.core.model.convert import restore
    from lte_lightning.core.model.decoding import fused_decoding
    from lte_lightning.core.model.experts import set_mode
    from lte_lightning.core.model.fusable import why_not_fused
    from lte_lightning.core.model.quantize import QUANTIZATIONS
    from lte_lightning.core.model.thresholds import set_sparsity
    from lte_lightning.data.text import load_tokenizer

    for name, value, choices in (
        ("dtype", dtype, ("auto", *DTYPES)),
        ("quantisation", quantize or "int8", QUANTIZATIONS),
    ):
        if value not in choices:
            raise UserError(f"unknown {name} {value!r}; there are {', '.join(choices)}")
    kernels, quantization = find_backend(backend), next((each for each in QUANTIZATIONS if each == quantize), None)
    source = find_source(folder)
    kind = quantize or source.quantized
    target = find_device("cpu" if kind and device == "auto" else device)
    if kind and target.type != "cpu":
        remedy = "leave one of them out" if quantize else "leave --device out"
        raise UserError(f"--device is {device}, and {kind} weights run on a CPU only; {remedy}")
    skips = source.mode not in (None, "dense")
    for_experts = {"--backend": backend != "auto", "--dense": dense, "--sparsity": sparsity is not None}
    for option, is_given in for_experts.items():
        if is_given and not skips:
            state = "a plain model" if source.mode is None else "saved in mode dense"
            raise UserError(f"{option} is for models that select experts, and {folder} is {state}; leave it out")
    tokenizer = load_tokenizer(source.name, generates=True)
    inputs = encode(source, tokenizer, _read(prompt), chat, max_new_tokens).to(target)
    if threads:
        torch.set_num_threads(threads)
    model = source.load(kernels, DTYPES.get(dtype, "auto"), target, quantization)
    if sparsity is not None:
        set_sparsity(model, sparsity)
    choose_tokens(model, tokenizer, temperature)
    if source.mode != "hard":
        state = "is a plain model" if source.mode is None else f"was saved in mode {source.mode}"
        print(f"{source.name} {state}: every neuron of its FFNs runs", file=sys.stderr)
    with nullcontext() if why_not_fused(model) else fused_decoding(model):
        ids_BT, text = write(model, tokenizer, inputs, max_new_tokens)
    summary = source.mode or "dense"
    if summary == "hard":
        summary = f"FFN sparsity {100 * used_sparsity(model, inputs, ids_BT):.1f} %"
    summary += f", {kind}" if kind else ""
    print(f"{text}, {summary}", file=sys.stderr)
    if dense:
        if kind:  # its dense weights are gone
            set_mode(model, "dense")
        else:
            restore(model)
        _, plain = write(model, tokenizer, inputs, max_new_tokens)
        ratio = f"; sparse is {text.rate / plain.rate:.2f}x as fast" if text.rate and plain.rate else ""
        print(f"{plain}, dense{ratio}", file=sys.stderr)


def _read(prompt: str) -> str:
    try:
        if prompt == "-":
            if sys.stdin.isatty():
                print("type the prompt, then Ctrl-D:", file=sys.stderr)
            prompt = sys.stdin.read().removesuffix("\n")  # echo adds it, and it would change the continuation
        prompt.encode()
    except UnicodeError as error:
        raise UserError(f"the prompt is not UTF-8 text: {error}") from error
    return prompt
