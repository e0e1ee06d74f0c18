"""The table of posteriors: names, sizes, identity and the refusal of bad input."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svae_jax import latents
from tests.latents.oracles import POSTERIORS, every_posterior, random_flat, random_params

NAMES = ("vector", "naive", "mvn", "lowrank", "mvn_full", "lowrank_full")
SIZES = {"height": 3, "width": 3, "maps": 4}


def test_names():
    assert latents.names() == NAMES


@pytest.mark.parametrize(
    ("name", "d", "maps", "expected"),
    [
        # §4.4 of the paper: CelebA, then CIFAR-10.
        ("vector", 1, 81, 162),
        ("naive", 3, 64, 1152),
        ("mvn", 3, 64, 960),
        ("lowrank", 3, 64, 768),
        ("vector", 1, 150, 300),
        ("naive", 3, 128, 2304),
        ("mvn", 3, 128, 1920),
        ("lowrank", 3, 128, 1536),
    ],
)
def test_num_params_are_the_papers(name, d, maps, expected):
    assert latents.make(name, height=d, width=d, maps=maps).num_params == expected


@pytest.mark.parametrize("d", [1, 2, 4])
def test_num_params_are_the_tables(d):
    for rank in range(1, d + 1):
        assert latents.make("lowrank", height=d, width=d, maps=5, rank=rank).num_params == (
            5 * (2 * d * rank + 2 * d)
        )
        assert latents.make("lowrank_full", height=d, width=d, maps=5, rank=rank).num_params == (
            5 * (2 * d * rank + d * (d + 1))
        )
    full = latents.make("mvn_full", height=d, width=d, maps=5)
    assert full.num_params == 5 * (d**2 + d * (d + 1))


@every_posterior
def test_sizes_are_attributes(post):
    maps = post.mean(post.unpack(jnp.zeros(post.num_params))).shape
    assert maps == (post.height, post.width, post.maps)


def test_leaves_and_their_shapes():
    post = latents.make("lowrank_full", height=3, width=4, maps=5, rank=2)
    params = post.unpack(jnp.zeros((7, 6, post.num_params)))
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "mu": (7, 6, 3, 2, 5),
        "nu": (7, 6, 4, 2, 5),
        "row_log_variance": (7, 6, 3, 5),
        "col_log_variance": (7, 6, 4, 5),
        "row_lower": (7, 6, 3, 5),
        "col_lower": (7, 6, 6, 5),
    }
    post = latents.make("naive", height=3, width=4, maps=5)
    params = post.unpack(jnp.zeros((7, post.num_params)))
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "mean": (7, 3, 4, 5),
        "log_variance": (7, 3, 4, 5),
    }


@every_posterior
def test_unpack_uses_every_number_once(post):
    params = post.unpack(jnp.arange(post.num_params, dtype=jnp.float32))
    used = np.concatenate([np.ravel(leaf) for leaf in params.values()])
    np.testing.assert_array_equal(np.sort(used), np.arange(post.num_params))


def test_equal_posteriors_are_equal_and_hash_alike():
    one, two = (latents.make("lowrank", **SIZES, rank=2) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    others = [
        latents.make("lowrank", **SIZES, rank=1),
        latents.make("lowrank_full", **SIZES, rank=2),
        latents.make("lowrank", **(SIZES | {"maps": 5}), rank=2),
    ]
    assert len({one, *others}) == 4


def test_a_posterior_cannot_be_changed():
    with pytest.raises(AttributeError):
        latents.make("mvn", **SIZES).name = "naive"


def assert_refused(message, name="mvn", **sizes):
    """`make` refuses, in exactly this line."""
    # Unwrapped: these tests check types at run time, and users' calls do not.
    make = inspect.unwrap(latents.make)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the whole line is compared)
        make(name, **(SIZES | sizes))
    assert str(refusal.value) == message


def test_unknown_name_is_refused_with_those_there_are():
    assert_refused(
        "name must be one of vector, naive, mvn, lowrank, mvn_full, lowrank_full, got name='mnv'",
        name="mnv",
    )


@pytest.mark.parametrize("argument", ["height", "width", "maps", "rank"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "3", None])
def test_sizes_must_be_positive_integers(argument, value):
    message = f"{argument} must be a positive integer, got {argument}={value!r}"
    assert_refused(message, name="lowrank", **{argument: value})


@pytest.mark.parametrize("argument", ["height", "width", "maps"])
@pytest.mark.parametrize("value", [0, True])
def test_prior_refuses_such_sizes_too(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a positive integer"):
        latents.sample_prior(jax.random.key(0), (2,), **(SIZES | {argument: value}))


@pytest.mark.parametrize("name", ["lowrank", "lowrank_full"])
def test_rank_is_at_most_the_shorter_side(name):
    assert latents.make(name, height=3, width=4, maps=2, rank=3).num_params > 0
    message = "rank must be between 1 and min(height, width) = 3, got rank=4"
    assert_refused(message, name=name, height=5, rank=4)
    assert_refused(message, name=name, width=5, rank=4)


@pytest.mark.parametrize("name", ["naive", "mvn", "mvn_full"])
def test_rank_is_refused_for_a_free_mean(name):
    message = f"rank must be 1 for {name}, whose mean is unconstrained, got rank=2"
    assert_refused(message, name=name, rank=2)


@pytest.mark.parametrize("sizes", [(3, 3), (1, 3), (3, 1)])
def test_vector_has_no_space(sizes):
    height, width = sizes
    message = (
        f"height and width must be 1 for vector, got height={height}, width={width}; its length is "
        "maps"
    )
    assert_refused(message, name="vector", height=height, width=width)


@every_posterior
@pytest.mark.parametrize("surplus", [-1, 1])
def test_unpack_refuses_another_number_of_numbers(post, surplus):
    with pytest.raises(ValueError, match=rf"flat must end in num_params = {post.num_params} "):
        post.unpack(jnp.zeros((2, post.num_params + surplus)))


def test_unpack_refuses_a_scalar():
    with pytest.raises(ValueError, match="num_params"):
        inspect.unwrap(type(POSTERIORS["mvn"]).unpack)(POSTERIORS["mvn"], jnp.zeros(()))


@every_posterior
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 2)])
def test_log_prob_refuses_another_shape(post, batch):
    params = random_params(post, (2,), dtype=np.float32)
    z = jnp.zeros((*batch, post.height, post.width, post.maps))
    with pytest.raises(ValueError, match="z must have the shape"):
        post.log_prob(params, z)


def test_log_prob_refuses_maps_transposed():
    post = POSTERIORS["mvn"]
    params = post.unpack(random_flat(post, dtype=np.float32))
    with pytest.raises(ValueError, match=r"z must .* \(3, 2, 2\), got \(2, 3, 2\)"):
        post.log_prob(params, jnp.zeros((2, 3, 2)))
