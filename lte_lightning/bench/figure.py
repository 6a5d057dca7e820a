"""What a benchmark finds."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Figure:
    """One row. Times are medians in milliseconds, of one FFN block or of the whole measured model.

    Args:
        shape: Name of the shape, or the folder.
        scope: ``ffn`` or ``model`` (all its layers and the look-up of the embedding, no head).
        phase: ``decode`` (a new token for each of ``tokens`` sequences) or ``prefill``.
        dtype: Of weights and input; ``mixed`` is float32 under bfloat16 autocast.
        tokens: Tokens per call, each with a mask of its own.
        sparsity: Share of the experts that a token skips.
        backend: What computed, a rival's name included.
        threads: torch's.
        dense_ms: The dense model's.
        ms: Ours, router included.
        ratio: ``dense_ms / ms``.
        router_ms: The selection alone.
        bound: The best possible ratio: by bytes of weights read in decode (union of the tokens' experts), by
            multiply-adds in prefill; the router is paid in both.
        share_of_bound: ``ratio / bound``. Above 1 where the dense model is slower than memory allows.
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


COLUMNS = [field.name for field in fields(Figure)]
