import pytest
import torch
from torch.nn import functional

from lte_lightning.kernels.cpu import quantized as cpu_quantized
from lte_lightning.kernels.cpu.build import build
from lte_lightning.kernels.cpu.instructions import instruction_set, instruction_sets
from lte_lightning.kernels.cpu.quantized import run_quantized, run_quantized_linear
from lte_lightning.kernels.layout import ACTIVATIONS, hidden_activations
from lte_lightning.kernels.quantized import (
    GROUP,
    Quantized,
    QuantizedExperts,
    Shape,
    dequantize,
    quantize_matrix,
)
from lte_lightning.kernels.reference import run_reference

BITS = (8, 4)
# plain, narrower than a block, wider; parts of rows and of columns, which blocks fit or do not fit
SHAPES = (
    Shape(1, 48, 1, 64),
    Shape(1, 3, 1, 5),
    Shape(1, 70, 1, 100),
    Shape(5, 24, 1, 70),
    Shape(3, 32, 1, 64),
    Shape(1, 70, 5, 24),
    Shape(1, 64, 3, 32),
    Shape(1, 40, 2, 48),
)


def matrix(shape, bits):
    return quantize_matrix(torch.randn(shape.outputs, shape.inputs) * shape.inputs**-0.5, bits, shape)


def experts(E, S, D, bits, gated=True, biases=True, activation="silu"):
    rows, columns = Shape(E, S, 1, D), Shape(1, D, E, S)
    return QuantizedExperts(
        matrix(rows, bits),
        matrix(columns, bits),
        activation,
        matrix(rows, bits) if gated else None,
        torch.randn(E * S) if biases else None,
        torch.randn(E * S) if gated and biases else None,
        torch.randn(D) if biases else None,
    )


def rounded(x, parts=1):
    """What the kernel makes of its input: 8 bits in groups of 32."""
    columns = x.shape[-1] // parts
    groups = functional.pad(x.float().unflatten(-1, (parts, columns)), (0, -columns % GROUP)).unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127
    q = (groups / torch.where(scale > 0, scale, 1.0)).round() * scale
    return q.flatten(-2)[..., :columns].flatten(-2)


def oracle(x_ND, mask_NE, w):
    """Float32 products of the dequantised weights and rounded inputs, expert by expert."""
    E, S = w.up.shape.row_parts, w.up.shape.rows
    up_NF = functional.linear(rounded(x_ND), dequantize(w.up), w.up_bias_F)
    gate_NF = None if w.gate is None else functional.linear(rounded(x_ND), dequantize(w.gate), w.gate_bias_F)
    _, hidden_NF = hidden_activations(ACTIVATIONS[w.activation], up_NF, gate_NF)
    keep_NF = mask_NE.repeat_interleave(S, dim=1)
    hidden_NF = torch.where(keep_NF, rounded(hidden_NF, E), 0.0)
    return functional.linear(hidden_NF, dequantize(w.down), w.down_bias_D).to(x_ND.dtype)


def assert_close(actual, expected, steps=0.02):
    """Up to sums, and here and there a hidden activation that falls on the other side of a rounding."""
    assert actual.shape == expected.shape
    assert (actual.float() - expected.float()).abs().max() < steps
    assert (actual.float() - expected.float()).norm() <= 0.005 * (1 + expected.float().norm())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_matrix_is_rounded_to_half_a_step(shape, bits):
    weight = torch.randn(shape.outputs, shape.inputs)
    restored = dequantize(quantize_matrix(weight, bits, shape))
    assert (restored - weight).norm() < {8: 0.007, 4: 0.09}[bits] * weight.norm()
    step = weight.abs().amax() / {8: 127, 4: 7}[bits]
    assert (restored - weight).abs().max() < 1.01 * step / {8: 2, 4: 1}[bits]


def test_what_eight_bits_can_say_is_kept_exactly():
    weight = torch.randint(-127, 128, (40, 64)).float()
    weight[:, [0, 32]] = 127
    assert dequantize(quantize_matrix(weight, 8, Shape(1, 40, 1, 64))).equal(weight)
    zeros = torch.zeros(40, 64)
    for bits in BITS:
        assert dequantize(quantize_matrix(zeros, bits, Shape(1, 40, 1, 64))).equal(zeros)


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_looked_up(bits):
    kept = matrix(Shape(1, 70, 1, 100), bits)
    rows = torch.tensor([69, 0, 17, 17])
    assert dequantize(kept, rows).equal(dequantize(kept)[rows])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    weight = torch.randn(16, 32)
    weight[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_matrix(weight, 8, Shape(1, 16, 1, 32))
    with pytest.raises(ValueError, match=r"the weight has shape .*, expected"):
        quantize_matrix(weight, 8, Shape(1, 32, 1, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape, bits, dtype):
    kept, bias = matrix(shape, bits), torch.randn(shape.outputs)
    x = torch.randn(2, 7, shape.inputs).to(dtype)
    expected = rounded(x, shape.column_parts) @ dequantize(kept).T + bias
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    actual = run_quantized_linear(x, kept, bias.to(dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)
    exact = x.float() @ dequantize(kept).T + bias
    assert (actual - exact).norm() < 0.012 * exact.norm()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("instructions", instruction_sets())
def test_every_instruction_set_of_this_machine(instructions, bits, monkeypatch):
    levels = list(instruction_sets())
    if levels.index(instructions) > levels.index(instruction_set()):
        pytest.skip(f"this machine has no {instructions}")
    monkeypatch.setattr(cpu_quantized, "library", lambda: build(instructions))
    w = experts(5, 24, 70, bits)
    for tokens in (1, 30):
        x_ND, mask_NE = torch.randn(tokens, 70), torch.rand(tokens, 5) > 0.5
        assert_close(run_quantized(x_ND, mask_NE, w), oracle(x_ND, mask_NE, w))
    kept, x = matrix(Shape(1, 70, 1, 100), bits), torch.randn(9, 100)
    torch.testing.assert_close(run_quantized_linear(x, kept), rounded(x) @ dequantize(kept).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize(("E", "S", "D"), [(4, 32, 64), (3, 48, 33), (7, 5, 16), (1, 64, 20)])
def test_experts(E, S, D, gated, activation, bits):
    w = experts(E, S, D, bits, gated, biases=gated, activation=activation)
    x_ND = torch.randn(11, D)
    for mask_NE in (torch.rand(11, E) > 0.5, torch.ones(11, E, dtype=torch.bool)):
        actual = run_quantized(x_ND, mask_NE, w)
        assert_close(actual, oracle(x_ND, mask_NE, w))
        exact = run_reference(x_ND, mask_NE, w.dequantized(torch.float32))
        assert (actual - exact).norm() < 0.03 * (1 + exact.norm())


@pytest.mark.parametrize("bits", BITS)
def test_nothing_selected_is_the_bias(bits):
    w = experts(4, 32, 64, bits)
    x_ND, mask_NE = torch.randn(3, 64), torch.zeros(3, 4, dtype=torch.bool)
    assert run_quantized(x_ND, mask_NE, w).equal(w.down_bias_D.expand(3, -1))
    assert run_quantized(x_ND[:0], mask_NE[:0], w).shape == (0, 64)


@pytest.mark.parametrize("bits", BITS)
def test_rows_and_threads_change_no_bit(bits):
    w, kept = experts(5, 48, 70, bits), matrix(Shape(1, 70, 1, 70), bits)
    x_ND, mask_NE = torch.randn(300, 70), torch.rand(300, 5) > 0.5
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        all_rows, linear_rows = run_quantized(x_ND, mask_NE, w), run_quantized_linear(x_ND, kept)
        for first, last in ((0, 1), (5, 8), (100, 115), (140, 300)):
            rows = slice(first, last)
            assert run_quantized(x_ND[rows], mask_NE[rows], w).equal(all_rows[rows])
            assert run_quantized_linear(x_ND[rows], kept).equal(linear_rows[rows])
        for count in (2, 3):
            torch.set_num_threads(count)
            assert run_quantized(x_ND, mask_NE, w).equal(all_rows)
            assert run_quantized_linear(x_ND, kept).equal(linear_rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", BITS)
def test_matrices_that_read_one_input_round_it_once(bits, monkeypatch):
    kept = [matrix(Shape(1, 48, 1, 70), bits) for _ in range(3)]
    x, addresses, rounded_again = torch.randn(2, 9, 70), cpu_quantized._addresses, []
    monkeypatch.setattr(
        cpu_quantized, "_addresses", lambda given: rounded_again.append(given[0] is not None) or addresses(given)
    )

    def compute(*inputs):
        rounded_again.clear()
        outs = [run_quantized_linear(each, m) for each, m in zip(inputs, kept, strict=False)]
        for each, m, out in zip(inputs, kept, outs, strict=False):
            assert out.equal(run_quantized_linear(each.clone(), m))
        return rounded_again[: len(outs)]

    assert compute(x, x, x) == [True, False, False]
    assert compute(x, x, x) == [True, False, False]  # someone may have written to it through numpy
    assert compute(x.mT.contiguous().mT, x, x) == [True, True, False]
    x[0, 0] = 7.0
    assert compute(x, x) == [True, False]
    run_quantized_linear(x, kept[2])
    x[1] += 1.0
    assert compute(x) == [True]
    run_quantized_linear(x, kept[1])
    x.data = torch.randn(2, 9, 70)
    assert compute(x) == [True]
    with torch.inference_mode():  # changes in place leave no trace
        x = torch.randn(2, 9, 70)
        assert compute(x, x) == [True, True]


def test_more_tokens_than_are_taken_at_a_time():
    w = experts(5, 24, 70, 8)
    x_ND, mask_NE = torch.randn(2500, 70), torch.rand(2500, 5) > 0.5
    assert_close(run_quantized(x_ND, mask_NE, w), oracle(x_ND, mask_NE, w), steps=0.1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_finite_spoils_its_token_alone(value, bits):
    w, kept = experts(4, 32, 64, bits), matrix(Shape(1, 40, 1, 64), bits)
    x_ND, mask_NE = torch.randn(9, 64), torch.ones(9, 4, dtype=torch.bool)
    clean, clean_linear = run_quantized(x_ND, mask_NE, w), run_quantized_linear(x_ND, kept)
    x_ND[4, 33] = value
    for actual, expected in (
        (run_quantized(x_ND, mask_NE, w), clean),
        (run_quantized_linear(x_ND, kept), clean_linear),
    ):
        assert actual[4].isnan().all()
        others = torch.arange(9) != 4
        assert actual[others].equal(expected[others])
    mask_NE[4] = False  # nothing reads it
    assert run_quantized(x_ND, mask_NE, w)[4].equal(w.down_bias_D)


@pytest.mark.parametrize("bits", BITS)
def test_unselected_experts_are_not_read(bits):
    w = experts(4, 32, 64, bits)
    x_ND, mask_NE = torch.randn(6, 64), torch.rand(6, 4) > 0.5
    mask_NE[:, 2] = False
    before = run_quantized(x_ND, mask_NE, w)
    for kept in (w.up, w.gate):
        kept.scale.unflatten(1, (4, -1))[0, 2] = float("nan")
    w.down.scale[2] = float("nan")
    assert run_quantized(x_ND, mask_NE, w).equal(before)
    mask_NE[3, 2] = True
    assert run_quantized(x_ND, mask_NE, w).isnan().all(dim=1).tolist() == [i == 3 for i in range(6)]


def test_extreme_inputs_neither_overflow_nor_divide_by_zero():
    kept = matrix(Shape(1, 40, 1, 64), 8)
    x = torch.stack([torch.full((64,), value) for value in (0.0, 1e-40, 1e-20, 1e30)])
    actual = run_quantized_linear(x, kept)
    assert actual[:2].abs().max() == 0
    torch.testing.assert_close(actual[2:], x[2:] @ dequantize(kept).T, rtol=1e-4, atol=1e25)
    assert actual[2].abs().max() > 0


@pytest.mark.parametrize("bits", BITS)
def test_are_well_made_operators(bits):
    w, x_ND, mask_NE = experts(4, 32, 64, bits), torch.randn(5, 64), torch.rand(5, 4) > 0.5
    ops, checks = torch.ops.lte_lightning, ("test_schema", "test_faketensor")
    shape = w.up.shape.ints()
    for bias in (w.up_bias_F, None):
        linear = (x_ND.view(5, 1, 64), w.up.blocks, w.up.scale, bias, shape)
        result = torch.library.opcheck(ops.quantized_linear, linear, test_utils=checks)
        assert set(result.values()) == {"SUCCESS"}
    up, down = (w.up.blocks, w.up.scale), (w.down.blocks, w.down.scale)
    for gate in ((w.gate.blocks, w.gate.scale), (None, None)):
        ffn = (x_ND, mask_NE, *up, *gate, *down, None, None, None, "silu", 32)
        assert set(torch.library.opcheck(ops.quantized_ffn, ffn, test_utils=checks).values()) == {"SUCCESS"}


@pytest.mark.parametrize("bits", BITS)
def test_without_a_compiler_torch_computes_the_dequantised_weights(bits, monkeypatch):
    monkeypatch.setattr(cpu_quantized, "library", lambda: None)
    w, x_ND, mask_NE = experts(4, 32, 64, bits), torch.randn(5, 64), torch.rand(5, 4) > 0.5
    expected = run_reference(x_ND, mask_NE, w.dequantized(torch.float32))
    torch.testing.assert_close(run_quantized(x_ND, mask_NE, w), expected, rtol=1e-4, atol=1e-4)
    kept, bias = matrix(Shape(1, 70, 1, 64), bits), torch.randn(70)
    expected = functional.linear(x_ND, dequantize(kept), bias)
    torch.testing.assert_close(run_quantized_linear(x_ND, kept, bias), expected)


def test_wrong_inputs_are_refused():
    kept = matrix(Shape(1, 40, 1, 64), 8)
    with pytest.raises(ValueError, match="float64"):
        run_quantized_linear(torch.randn(2, 64).double(), kept)
    with pytest.raises(ValueError, match=r"\[2, 60\].*64"):
        run_quantized_linear(torch.randn(2, 60), kept)
    assert isinstance(kept, Quantized)
