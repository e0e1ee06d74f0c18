"""Ways through the space of latents: interpolation, and the directions in which images differ."""

import numpy as np
from jaxtyping import Bool, Float

Latent = Float[np.ndarray, "h w n"]


def linear(a: Latent, b: Latent, weights: Float[np.ndarray, " t"]) -> Float[np.ndarray, "t h w n"]:
    """(1 − t)·a + t·b for each weight t."""
    t = weights[:, None, None, None]
    return ((1 - t) * a + t * b).astype(a.dtype)


def spherical(
    a: Latent, b: Latent, weights: Float[np.ndarray, " t"]
) -> Float[np.ndarray, "t h w n"]:
    """Slerp: [sin((1 − t)·Ω)·a + sin(t·Ω)·b] / sin Ω for each t; Ω is the angle from a to b.

    Along it the norm of latents of equal norm stays what it is, where `linear` would shorten them:
    in high dimensions the prior's draws have nearly one norm (White 2016). The angle is that of the
    whole arrays. Where they are parallel it is `linear`; where they are opposite, no arc is singled
    out, and it is `linear` too.
    """
    flat_a, flat_b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    norms = np.linalg.norm(flat_a) * np.linalg.norm(flat_b)
    cosine = flat_a @ flat_b / norms if norms > 0 else 1.0
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-6:
        return linear(a, b, weights)
    t = weights[:, None, None, None]
    path = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return path.astype(a.dtype)


def principal_directions(
    means: Float[np.ndarray, "m h w n"], where: Bool[np.ndarray, "h w n"], count: int
) -> Float[np.ndarray, "k h w n"]:
    """The principal directions of latents, each as long as their standard deviation along it.

    Args:
        means: the posteriors' means of m ≥ 2 images.
        where: the entries that may change; the directions are zero elsewhere. One location, one
            map, or all: the directions are those of these entries alone.
        count: how many, the largest first; fewer where there are fewer entries or images.

    Returns:
        k directions; in each, the entry of largest size is positive.
    """
    chosen = means[:, where].astype(np.float64)
    _, singular, rows = np.linalg.svd(chosen - chosen.mean(0), full_matrices=False)
    rows = rows[:count] * (singular[:count, None] / np.sqrt(len(means) - 1))
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1, keepdims=True), 1)
    directions = np.zeros((len(rows), *means.shape[1:]), means.dtype)
    directions[:, where] = rows * np.where(largest < 0, -1, 1)
    return directions
