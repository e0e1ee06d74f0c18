"""Comparisons of samples with held-out images, with the names that their figures need."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, PRNGKeyArray, UInt8

from svae_jax.evaluation.estimates import Estimate
from svae_jax.evaluation.quality import frechet, kernel, neighbours, wasserstein
from svae_jax.evaluation.quality.features import Extractor

Pixels = UInt8[np.ndarray, "_n h w c"]
Features = Float[np.ndarray, "_n d"]


class Comparison(NamedTuple):
    """Distances of a set of samples to a reference, and how they were taken.

    Attributes:
        reference: the split, such as "test".
        num_samples: size of the one set.
        num_reference: size of the other.
        settings: package, network, layer, k and the like, by name.
        figures: values by name.
    """

    reference: str
    num_samples: int
    num_reference: int
    settings: dict[str, Any]
    figures: dict[str, Estimate]


def compare_pixels(
    key: PRNGKeyArray, samples: Pixels, images: Pixels, *, reference: str, **options: int
) -> Comparison:
    """Sliced Wasserstein distances: `swd_SIZE` of each pyramid level, and `swd_mean`.

    Args:
        key: of `wasserstein.sliced_wasserstein`, as are the `options`. One key for all sets that
            are to be compared.
        samples: the samples, or training images for the floor.
        images: held-out images.
        reference: the split that these are.
        **options: `max_patches`, `num_groups`.
    """
    found = wasserstein.sliced_wasserstein(key, samples, images, **options)
    levels = {f"swd_{s}": level for s, level in zip(found.sizes, found.levels, strict=True)}
    settings = {
        "distance": "sliced Wasserstein on Laplacian pyramids (Karras et al. 2018), not times 1000",
        "patch": wasserstein.PATCH,
        "directions": wasserstein.NUM_DIRECTIONS,
    }
    figures = {**levels, "swd_mean": found.mean}
    return Comparison(reference, len(samples), len(images), settings, figures)


def compare_features(
    key: PRNGKeyArray,
    extractor: Extractor,
    samples: Features,
    images: Features,
    *,
    reference: str,
    k: int = 5,
    num_replicates: int = 10,
) -> Comparison:
    """Fréchet and kernel distance, precision, recall, density and coverage in a feature space.

    The first two are `fid` and `kid` for Inception features, and `frechet` and `kernel` for others.

    Args:
        key: of the bootstrap and of the kernel distance's blocks.
        extractor: what computed the features.
        samples: features of the samples, or of training images for the floor.
        images: features of held-out images.
        reference: the split that these are.
        k: neighbours of precision, recall, density and coverage.
        num_replicates: of the Fréchet distance's bootstrap; each costs as much as the distance.
    """
    names = ("fid", "kid") if extractor.gives_fid else ("frechet", "kernel")
    figures = {
        names[0]: frechet.frechet_distance(key, samples, images, num_replicates=num_replicates),
        names[1]: kernel.kernel_distance(key, samples, images),
        **neighbours.manifolds(samples, images, k=k)._asdict(),
    }
    settings = {
        "features": extractor.name,
        "package": extractor.package,
        "network": extractor.network,
        "layer": extractor.layer,
        "k": k,
    }
    return Comparison(reference, len(samples), len(images), settings, figures)


def to_json(record: Any) -> Any:
    """Records, dictionaries, sequences and arrays as JSON values; NaN becomes null."""
    if hasattr(record, "_asdict"):
        record = record._asdict()
    if isinstance(record, dict):
        return {name: to_json(value) for name, value in record.items()}
    if isinstance(record, np.ndarray | np.generic):
        record = record.tolist()
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record
