"""`convolutions` against `jax.lax`, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from svae_jax.model import convolutions

LAYOUT = ("NHWC", "HWIO", "NHWC")
CASES = [
    # kernel, stride, padding, size
    (5, 2, "SAME", 4),
    (5, 2, "SAME", 17),
    (4, 2, "VALID", 16),
    (5, 2, "SAME", 3),
    (5, 2, "VALID", 7),
    (3, 2, "SAME", 3),
    (3, 1, "VALID", 6),
    (3, 1, "SAME", 5),
    (3, 1, "VALID", 3),
    (4, 3, "SAME", 4),
    (2, 3, "VALID", 4),
    (1, 1, "SAME", 3),
]


def _normal(shape, dtype=np.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _arrays(kernel, size):
    return _normal((2, size, size + 1, 3)), _normal((kernel, kernel, 3, 4), seed=1)


def _assert_same_with_gradients(ours, reference, x, w):
    def with_gradients(function):
        """The output, and the gradients for one cotangent."""

        @jax.jit
        def run(x, w):
            output, backward = jax.vjp(function, x, w)
            return output, backward(jnp.sin(jnp.arange(output.size).reshape(output.shape) ** 2.0))

        return run(x, w)

    actual, actual_gradients = with_gradients(ours)
    expected, expected_gradients = with_gradients(reference)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
    for gradient, known in zip(actual_gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, known, rtol=1e-11, atol=1e-11)
    return actual.shape[1:3]


@pytest.mark.parametrize("kind", convolutions.KINDS)
@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), CASES)
def test_conv_and_its_gradients_equal_lax(x64, kernel, stride, padding, size, kind):
    x, w = _arrays(kernel, size)

    def reference(x, w):
        return lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=LAYOUT)

    def ours(x, w):
        return convolutions.conv(x, w, (stride, stride), (padding, padding), kind)

    made = _assert_same_with_gradients(ours, reference, x, w)
    sizes = (convolutions.output_size(n, kernel, stride, padding) for n in x.shape[1:3])
    assert made == tuple(sizes)


@pytest.mark.parametrize("kind", convolutions.KINDS)
@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), CASES)
def test_conv_transpose_and_its_gradients_equal_lax(x64, kernel, stride, padding, size, kind):
    x, w = _arrays(kernel, size)

    def reference(x, w):
        return lax.conv_transpose(x, w, (stride, stride), padding, dimension_numbers=LAYOUT)

    def ours(x, w):
        return convolutions.conv_transpose(x, w, (stride, stride), (padding, padding), kind)

    made = _assert_same_with_gradients(ours, reference, x, w)
    sizes = (convolutions.transposed_output_size(n, kernel, stride, padding) for n in x.shape[1:3])
    assert made == tuple(sizes)


@pytest.mark.parametrize(
    ("strides", "lows", "kernel"),
    [
        ((2, 2), (1, 2), (5, 5)),
        ((1, 1), (1, 2), (2, 3)),
        ((2, 3), (3, 0), (5, 5)),
        ((3, 1), (0, 0), (4, 1)),
        ((2, 3), (1, 2), (2, 2)),  # fewer taps than phases
        ((3, 2), (2, 1), (1, 3)),
    ],
)
def test_all_ways_to_an_adjoint_are_the_transpose(x64, strides, lows, kernel):
    sizes = (9, 7)
    k, y = _normal((*kernel, 3, 4)), _normal((2, 4, 3, 4), seed=1)

    def plain(x):
        return convolutions._plain_conv(x, k, strides, lows, y.shape[1:3])

    (expected,) = jax.jit(jax.linear_transpose(plain, jnp.zeros((2, *sizes, 3))))(y)
    for adjoint in (convolutions._dilated, convolutions._by_phase, convolutions._by_rows):
        actual = jax.jit(adjoint, static_argnums=(2, 3, 4))(y, k, strides, lows, sizes)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_is_rounded_once(stride):
    y, k = _normal((2, 4, 4, 8), jnp.bfloat16), _normal((5, 5, 3, 8), jnp.bfloat16, seed=1)
    overhanging = ((stride, stride), (0, 0), (3 * stride + 5, 3 * stride + 5))
    actual = convolutions._by_rows(y, k, *overhanging)
    assert actual.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: half a unit is 2⁻⁸ at most.
    exact = convolutions._dilated(y.astype(jnp.float32), k.astype(jnp.float32), *overhanging)
    np.testing.assert_allclose(actual.astype(jnp.float32), exact, rtol=2**-7.9, atol=1e-5)


def test_axes_have_their_own_stride_and_padding(x64):
    x, w = _arrays(3, 4)
    rows, cols = (
        convolutions.conv_transpose(x, w, (stride, stride), (padding, padding))
        for stride, padding in ((2, "SAME"), (1, "VALID"))
    )
    mixed = convolutions.conv_transpose(x, w, (2, 1), ("SAME", "VALID"))
    assert mixed.shape == (2, rows.shape[1], cols.shape[2], 4)
    expected = lax.conv_transpose(x, w, (2, 1), [(2, 1), (2, 2)], dimension_numbers=LAYOUT)
    np.testing.assert_allclose(mixed, expected, rtol=1e-12)


@pytest.mark.parametrize("apply", [convolutions.conv, convolutions.conv_transpose])
def test_second_derivatives_equal_lax(x64, apply):
    x, w = _arrays(5, 4)

    def curvature(function):
        def slope(x):
            return jnp.sum(jnp.sin(jax.grad(lambda x: jnp.sum(jnp.tanh(function(x))))(x)))

        return jax.grad(slope)(x)

    def reference(x):
        if apply is convolutions.conv:
            return lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=LAYOUT)
        return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=LAYOUT)

    ours = jax.jit(lambda: curvature(lambda x: apply(x, w, (2, 2), ("SAME", "SAME"))))()
    theirs = jax.jit(lambda: curvature(reference))()
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_conv_transpose_under_vmap_and_jacrev(x64):
    x, w = _arrays(5, 2)

    def ours(x):
        return convolutions.conv_transpose(x, w, (2, 2), ("SAME", "SAME"))

    def reference(x):
        return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=LAYOUT)

    stacked = jnp.stack([x, 2 * x])
    for change, at in ((jax.vmap, stacked), (jax.jacrev, x)):
        expected = jax.jit(change(reference))(at)
        np.testing.assert_allclose(jax.jit(change(ours))(at), expected, rtol=1e-12, atol=1e-12)


def test_forward_mode_says_what_it_cannot():
    x, w = jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: convolutions.conv_transpose(x, w, (2, 2), ("SAME", "SAME")), (x,), (x,))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_accelerators_keep_their_native_convolutions(platform):
    """Lowered for a platform that this machine may not have, forward and backward."""

    def loss(x, w):
        return jnp.sum(convolutions.conv_transpose(x, w, (2, 2), ("SAME", "SAME")) ** 2)

    arguments = jnp.ones((1, 4, 4, 3)), jnp.ones((5, 5, 3, 2))
    program = jax.export.export(jax.jit(jax.grad(loss, (0, 1))), platforms=[platform])(*arguments)
    has_zeros_between_pixels = "lhs_dilate = [2, 2]" in program.mlir_module()
    assert has_zeros_between_pixels == (platform != "cpu")


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_where_an_image_overhangs_a_cpu_adds_rows(platform, padding):
    def apply(x, w):
        return convolutions.conv_transpose(x, w, (1, 1), (padding, padding))

    arguments = jnp.ones((1, 6, 6, 3)), jnp.ones((3, 3, 3, 2))
    program = jax.export.export(jax.jit(apply), platforms=[platform])(*arguments)
    has_kernel_of_one_row = "tensor<1x3x3x6xf32>" in program.mlir_module()
    assert has_kernel_of_one_row == (platform == "cpu" and padding == "VALID")


def test_an_empty_batch(x64):
    x, w = _arrays(5, 4)
    for padding in ("SAME", "VALID"):
        made = convolutions.conv_transpose(x[:0], w, (2, 2), (padding, padding))
        assert made.shape[0] == 0


@pytest.mark.parametrize("apply", [convolutions.conv, convolutions.conv_transpose])
def test_another_kind_is_refused(apply):
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
    with pytest.raises(ValueError, match="kind must be one of auto, lax, got 'fast'"):
        apply(x, kernel, (1, 1), ("SAME", "SAME"), "fast")
