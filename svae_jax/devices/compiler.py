"""`jax.jit` with the fastest compiler options for the platform."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# YNNPACK only for sums: for the convolutions and products here, XLA's Eigen kernels are faster.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def options(platform: str) -> dict[str, str]:
    """Compiler options for `jax.jit` on this platform; empty except on CPU."""
    chosen = _CPU_OPTIONS if platform == "cpu" else {}
    try:
        jax.jit(lambda: 0, compiler_options=chosen).lower().compile()
    except (
        jax.errors.JaxRuntimeError
    ):  # the options are experimental: this version of XLA lacks them
        return {}
    return chosen


def jit(function: Callable, **kwargs: Any) -> Callable:
    """`jax.jit` with `options` of the platform that is JAX's default at the time of the call.

    Compiler options apply to a whole program, so under an outer trace this calls `function`
    directly.
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
