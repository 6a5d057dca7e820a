import pytest

from lte_lightning.kernels.roofline import GPUS, Gpu, predict

LLAMA = {"width": 4096, "neurons": 11008, "expert_size": 32, "gated": True, "bytes_per_weight": 2}


@pytest.mark.parametrize(
    ("sparsity", "bound"),
    # The column "FFN block alone, router included" of the bytes moved in LLaMA-2-7B at batch 1.
    [(0.25, 1.32), (0.4, 1.64), (0.5, 1.96), (0.65, 2.77), (0.8, 4.75)],
)
@pytest.mark.parametrize("gpu", GPUS)
def test_bound_of_one_token(gpu, sparsity, bound):
    assert predict(GPUS[gpu], **LLAMA, sparsity=sparsity).ratio == pytest.approx(bound, abs=0.01)


def test_counts_by_hand():
    # 3 projections of 2 x 8 weights, 2 bytes each; one byte a second, and products for nothing.
    gpu = Gpu(bandwidth=1.0, flops_16=1e9, flops_32=1.0)
    prediction = predict(gpu, width=2, neurons=8, expert_size=4, gated=True, bytes_per_weight=2, tokens=2, sparsity=0.5)
    assert prediction.dense_ms == 1e3 * 2 * (48 + 2 * 4)
    assert prediction.ffn_ms == 1e3 * 2 * (48 * 0.75 + 2 * 4)  # of two tokens that choose freely a quarter is left out
    assert prediction.router_ms == 1e3 * 2 * (4 + 2 * 4)
    prediction = predict(gpu, width=2, neurons=8, expert_size=4, gated=False, bytes_per_weight=4, tokens=100)
    assert prediction.dense_ms == 1e3 * 2 * 100 * 32
    assert str(prediction).startswith("predicted: ")


def test_many_tokens_are_bound_by_products_that_each_chose():
    prefill = predict(GPUS["H100 SXM"], **LLAMA, tokens=4096, sparsity=0.8)
    assert prefill.dense_ms / prefill.ffn_ms == pytest.approx(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.2}, "sparsity 1.2 and union"),
        ({"sparsity": 0.5, "union_sparsity": 0.6}, "union sparsity 0.6"),
        ({"bytes_per_weight": 1}, "bytes_per_weight is 1"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        predict(GPUS["H100 SXM"], **LLAMA | change)
