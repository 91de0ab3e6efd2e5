"""kernels/resident8: errors by format, layout, edges. The kernels' bits: test_adamw.py (interpreter), GPU tests."""

import math

import pytest
import torch

from kernel_resident8 import SHAPES, edges, expanded, heavy, packed
from misa_engine.kernels.resident8 import FORMATS, Packed, dequantise, format_named, quantise


def relative_error(weight, format):
    w = weight.double()
    return float((expanded(packed(weight, format)).double() - w).norm() / w.norm())


@pytest.mark.parametrize(
    ("format", "gaussian", "student5"), [("int8", 0.0065, 0.0095), ("int8_row", 0.0087, 0.020), ("fp8", 0.0265, 0.0264)]
)
def test_relative_errors_are_those_of_the_table(format, gaussian, student5):
    """At the size where they were measured, 1024 × 4096; 5% for another draw (of Student's t the largest of a row)."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1024, 4096, generator=generator)
    assert relative_error(normal, format) == pytest.approx(gaussian, rel=0.02)
    chi = torch.randn(5, 1024, 4096, generator=generator).square_().sum(0)
    assert relative_error(normal.div_((chi / 5).sqrt_()), format) == pytest.approx(student5, rel=0.05)


def test_bfloat16_steps_cost_nothing_and_half_of_the_bytes():
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(1))
    x = weight.view(256, 32, 128)
    step = x.abs().amax(-1, keepdim=True) / 127  # float32 steps
    float32 = float(((x / step).round() * step - x).norm() / x.norm())
    assert relative_error(weight, "int8") == pytest.approx(float32, rel=0.005)
    assert FORMATS["int8"].bytes((256, 4096)) == (256 * 4096, 256 * 32 * 2)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_is_off_by_at_most_half_a_code(shape, format):
    weight = heavy(shape, torch.float32)
    of = packed(weight, format)
    spec = FORMATS[format]
    steps = of.steps.double().repeat_interleave(spec.rows, 0)[: shape[0]]
    steps = steps.repeat_interleave(spec.cols or shape[1], 1)[:, : shape[1]]
    error = (expanded(of).double() - weight.double()).abs()
    if format == "fp8":  # 3 bits of mantissa, and steps of 2^-9 near zero
        bound = torch.maximum(weight.double().abs() * 2**-4, steps * 2**-10)
    else:
        bound = steps * (0.5 + 127 * 2**-8)  # a step rounded down costs the largest weight a quarter of a code
        bound = torch.where(steps > 0, bound, 0.0)
    assert bool((error <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros_and_what_comes_back_is_finite(format):
    of = packed(torch.zeros(130, 200), format)
    assert not of.steps.any() and torch.equal(expanded(of), torch.zeros(130, 200))
    out = expanded(packed(edges(), format))
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("format", FORMATS)
def test_the_largest_weight_of_a_block_keeps_its_sign_and_size(format):
    weight = heavy((256, 256), torch.float32)
    at = weight.abs().view(-1).argmax()
    largest, back = weight.view(-1)[at], expanded(packed(weight, format)).view(-1)[at]
    assert back == pytest.approx(float(largest), rel=2**-8)


@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16_is_one_rounding_of_the_exact_product(format):
    of = packed(heavy((130, 300), torch.bfloat16), format)
    assert torch.equal(expanded(of, torch.bfloat16), expanded(of).bfloat16())


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_are_known_without_allocating(format):
    for shape in SHAPES:
        of = packed(heavy(shape, torch.float32), format)
        assert sum(FORMATS[format].bytes(shape)) == of.nbytes == of.codes.nbytes + of.steps.nbytes
        assert Packed.allocate(FORMATS[format], shape, "meta").nbytes == of.nbytes


def test_fp8_is_the_layout_of_transformers():
    """Its own dequantisation reads ours, and what an FP8 checkpoint expands to rests again almost unchanged."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="needs transformers with FP8")
    weight = heavy((300, 384), torch.float32)
    of = packed(weight, "fp8")
    theirs = fp8._dequantize_fp8_weight(of.codes, of.steps, [128, 128], torch.float32)
    assert torch.equal(theirs, expanded(of))
    # 3 bits of mantissa are 8 bits' worth apart from what bfloat16 can round away: codes come back, steps to 2^-8
    again = expanded(packed(expanded(of, torch.bfloat16), "fp8"))
    error = float((again - theirs).norm() / theirs.norm())
    assert error < 2**-8 < relative_error(weight, "fp8") / 5


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(6), torch.zeros(2, 3, dtype=torch.float16), torch.zeros(3, 2).T, torch.zeros(2, 4)],
    ids=["vector", "float16", "transposed", "other shape"],
)
def test_bad_matrices_are_named(weight):
    of = Packed.allocate(FORMATS["int8"], (2, 3), "cpu")
    with pytest.raises(ValueError, match=r"contiguous float32 or bfloat16 matrix|has codes and steps"):
        quantise(weight, of, backend="reference")
    with pytest.raises(ValueError, match=r"contiguous float32 or bfloat16 matrix|has codes and steps"):
        dequantise(of, weight, backend="reference")


def test_unknown_formats_are_named():
    with pytest.raises(ValueError, match="unknown 8-bit format 'int4': choose one of int8, int8_row, fp8"):
        format_named("int4")


def test_a_large_matrix_is_handled_in_parts_and_says_the_same():
    from misa_engine.kernels.resident8 import reference

    weight = heavy((300, 500), torch.float32)
    for format in FORMATS:
        whole = packed(weight, format)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "PART", 500 * 128 + 1)
            parts = packed(weight, format)
            assert torch.equal(expanded(parts), expanded(whole)) and math.isfinite(expanded(parts).sum())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_itself_is_only_read(format, dtype):
    for shape in ((128, 256), (5, 130)):
        weight = heavy(shape, dtype)
        before = weight.clone()
        packed(weight, format)
        assert torch.equal(weight, before)
