"""One row of ``lte bench``: the time of one FFN block, or of a model without its head."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Timing:
    """A measured sparsity and backend. Times are medians in milliseconds, of one FFN block or of all measured layers.

    Args:
        shape: Name of the shape, or the folder.
        scope: ``ffn`` or ``model`` (all its layers and the look-up of the embedding, no head).
        phase: ``decode`` (a new token for each of ``tokens`` sequences) or ``prefill``.
        dtype: Type of weights and input; ``mixed`` is float32 under bfloat16 autocast.
        tokens: Tokens per call, each with its own mask.
        sparsity: Share of the experts that a token skips.
        backend: Name of the backend or rival.
        threads: Number of torch threads.
        dense_ms: Time of the dense model.
        ms: Time of the sparse model, router included.
        ratio: ``dense_ms / ms``.
        router_ms: Time of the router alone.
        bound: The best possible ratio: by bytes of weights read in decode (union of the tokens' experts), by
            multiply-adds in prefill; the router counts in both.
        share_of_bound: ``ratio / bound``. Above 1 if the dense model is slower than memory allows.
        load: Load average of the last minute.
    """

    shape: str
    scope: str
    phase: str
    dtype: str
    tokens: int
    sparsity: float
    backend: str
    threads: int
    dense_ms: float
    ms: float
    ratio: float
    router_ms: float
    bound: float
    share_of_bound: float
    load: float


COLUMNS = [field.name for field in fields(Timing)]
