"""`jax.jit` with the compiler's options that are best for the platform."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# YNNPACK for sums alone: for these convolutions and products, Eigen is the faster of XLA's two.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def options(platform: str) -> dict[str, str]:
    """What `jax.jit` takes as `compiler_options`: nothing but on a CPU."""
    chosen = _CPU_OPTIONS if platform == "cpu" else {}
    try:
        jax.jit(lambda: 0, compiler_options=chosen).lower().compile()
    except jax.errors.JaxRuntimeError:  # the options are experimental: this XLA has them no more
        return {}
    return chosen


def jit(function: Callable, **kwargs: Any) -> Callable:
    """As `jax.jit` with these arguments, for the platform that is JAX's default when it is called.

    Options belong to a whole program: within another function that is traced, this is the plain
    function.
    """
    compiled = functools.cache(
        lambda platform: jax.jit(function, compiler_options=options(platform), **kwargs)
    )

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
            return function(*args)
        return compiled(jax.default_backend())(*args)

    return call
