"""Trees as few arrays, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from svae_jax.training import flat

TREE = {
    "kernel": np.arange(24.0, dtype=np.float32).reshape(2, 3, 4),
    "bias": np.arange(4.0, dtype=np.float32) - 7,
    "scalar": np.float32(3),
    "count": np.int32(5),
    "none": {},
}


def test_small_arrays_are_one_vector_a_dtype_and_come_back():
    flattened = flat.flatten(jax.tree.map(jnp.asarray, TREE), at_most=10)
    assert {name: v.shape for name, v in flattened.vectors.items()} == {
        "float32": (5,), "int32": (1,),
    }  # fmt: skip
    assert [other.shape for other in flattened.others] == [(2, 3, 4)]
    jax.tree.map(np.testing.assert_array_equal, flat.restore(flattened), TREE)


def test_parts_are_flat_wherever_they_are_and_adam_does_not_notice():
    params = {name: jnp.asarray(TREE[name]) for name in ("kernel", "bias")}
    gradients = jax.tree.map(jnp.cos, params)
    adam = optax.adam(0.1)

    def update(params, state, gradients):
        updates, state = adam.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = {"params": params, "opt_state": adam.init(params), "step": jnp.int32(1)}
    flattened = flat.flatten_parts(state, params, at_most=10)
    assert isinstance(flattened["opt_state"][0].mu, flat.Flat)
    assert flattened["step"] is state["step"]
    small = flat.flatten_like(gradients, flattened["params"])
    got = update(flattened["params"], flattened["opt_state"], small)
    expected = update(params, state["opt_state"], gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), flat.restore_parts(got), expected
    )


def test_what_is_flat_may_be_flattened_again():
    inner = flat.flatten({"a": jnp.ones(2), "b": jnp.zeros(3)}, at_most=9)
    outer = flat.flatten((inner, jnp.arange(2)), at_most=9)
    again, numbers = flat.restore(outer)
    assert isinstance(again, flat.Flat)
    np.testing.assert_array_equal(flat.restore(again)["b"], np.zeros(3))
    np.testing.assert_array_equal(numbers, np.arange(2))


def test_a_plain_tree_is_left_alone():
    params = {"a": jnp.ones(2)}
    assert flat.flatten_like(params, params) is params
    assert flat.restore_parts(params) == params
