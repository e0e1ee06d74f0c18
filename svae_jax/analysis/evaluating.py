"""Evaluates a trained run: bounds, reconstructions, use of the latent, and quality of samples."""

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm
from jaxtyping import Num, UInt8

from svae_jax import config as configs
from svae_jax import data, files, identity, image_files, samplers, seeds, terminal
from svae_jax import model as models
from svae_jax import pixels as pixel_lib
from svae_jax.analysis import drawing, fitted, trained
from svae_jax.analysis.fitted import Fitted
from svae_jax.analysis.trained import Trained
from svae_jax.devices import runtime, sharding
from svae_jax.errors import UserError
from svae_jax.evaluation import bounds, closed_forms, grids, reconstruction
from svae_jax.evaluation.quality import comparison, neighbours
from svae_jax.evaluation.quality import features as feature_lib
from svae_jax.pixels import UINT8
from svae_jax.run import workdir

Pixels = Num[np.ndarray, "_n h w c"]
Pictures = UInt8[np.ndarray, "_n h w c"]

FLOOR = "training images"  # real images: no sampler is expected to come closer
_SHOWN = 32  # samples in a picture
_CONVERTED = 1000  # images at a time


class Settings(NamedTuple):
    """What an evaluation computes.

    Attributes:
        split: held-out images, in TFDS's syntax; empty for the run's `dataset.eval_split`.
        importance_samples: K of the importance-weighted bound, at least 1.
        num_samples: images drawn from each sampler, at least 20. All compared sets have the size of
            the smallest: this number, the held-out images, or the training images.
        features: one of `features.NAMES`; empty for distances of pixels only.
        seed: of the samples and of everything random in the distances.
    """

    split: str = ""
    importance_samples: int = 100
    num_samples: int = 10_000
    features: str = ""
    seed: int = 0


class RealImages(NamedTuple):
    """The images that samples are compared with, in 8 bits of the run's range of values.

    Attributes:
        split: the name of the held-out split.
        held_out: the reference of all distances, as many as there are samples.
        training: all training images, in which the nearest ones are searched.
        extractor: of features, or None.
        seed: of projections, patches and bootstraps, the same for all sets.
        cache: the directory in which their features are kept.
    """

    split: str
    held_out: Pictures
    training: Pictures
    extractor: feature_lib.Extractor | None
    seed: int
    cache: Path


@runtime.own_numerics()
def evaluate(
    directory: str | Path, settings: Settings, *, images: Any = None, data_dir: str | Path = ""
) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run on a held-out split, with every fitted sampler.

    The run may still be training: its checkpoints are only read. `evaluation.json`, and the
    pictures in `evaluation/`, are written to its workdir. For another split than the run's own,
    the split's name and a hash of it are added to both.

    Args:
        directory: the workdir.
        settings: what is computed.
        images: the arrays that the run is of, if it is of arrays from Python.
        data_dir: where the run's data set is now, if it has moved.

    Returns:
        The content of `evaluation.json`, where a figure is {"value", "standard_error"}: the model's
        identity, `bounds`, `floors`, `reconstruction`, `latents`, and for each set of samples its
        distances, and the `bounds` with its sampler in the prior's place.

    Raises:
        UserError: a mistake that the user can correct.
    """
    for field, least in (("importance_samples", 1), ("num_samples", 20)):
        if (value := getattr(settings, field)) < least:
            raise UserError(f"--{field}={value} must be at least {least}")
    key = seeds.key(settings.seed)
    shown, directory = str(directory), files.user_path(directory, "--workdir")
    model = trained.load(directory, images=images, data_dir=data_dir)
    dataset = model.config.dataset
    split = settings.split or dataset.eval_split
    held_out, training = (model.images(s) for s in (split, dataset.split))
    model.warn_overlap(split)
    if settings.features and dataset.channels not in (1, 3):
        raise UserError(
            f"--features={settings.features} takes images of 1 or 3 channels; this run's have "
            f"{dataset.channels}"
        )
    extractor = feature_lib.load(settings.features) if settings.features else None
    available = [name for name in samplers.names() if fitted.is_fitted(directory, name)]
    loaded = [fitted.load_sampler(directory, name, model) for name in available]
    name = _name(split, dataset.eval_split)
    workdir.create(directory / name)
    terminal.say(f"{shown}: step {model.step}; {len(held_out):,} images of {dataset.name} {split}")
    result: dict[str, Any] = {
        "workdir": shown,
        **fitted.model_identity(model),
        "config": model.config.to_dict(),
        "split": split,
        "num_images": len(held_out),
        "settings": settings._asdict(),
        "parameters": models.num_params(model.variables["params"]),
        **likelihood(model, training, held_out, settings.importance_samples, loaded),
    }
    of_priors = result.pop("priors")
    count = min(settings.num_samples, len(held_out), len(training))
    real = RealImages(
        split,
        _pictures(model, held_out[:count]),
        _pictures(model, training),
        extractor,
        settings.seed,
        data.cache_directory(dataset.cache_dir),
    )
    sets = {FLOOR: np.asarray(real.training[:count])}
    for sampler in loaded:
        terminal.say(f"  drawing {count:,} images from {sampler.name}")
        batches = drawing.draw(model, sampler, key, count)
        sets[sampler.name] = np.concatenate(
            [np.asarray(pixel_lib.to_uint8(batch)) for batch in batches]
        )
    result["samples"] = compare(sets, real, directory / name)
    for sampler, found in of_priors.items():
        result["samples"][sampler]["bounds"] = found
    grid = grids.row([grids.grid(sets[sampler.name][:_SHOWN], columns=4) for sampler in loaded])
    image_files.save_picture(directory / name / "samples.png", grid)
    content = comparison.to_json(result)
    files.write_json(directory / f"{name}.json", content)
    return content


def _pictures(model: Trained, images: Pixels) -> Pictures:
    """The images in 8 bits, in which distances are taken; those that have them are not copied."""
    if model.pixels == UINT8:
        return images
    levels = np.empty(images.shape, np.uint8)
    for begin in range(0, len(images), _CONVERTED):
        part = slice(begin, begin + _CONVERTED)
        levels[part] = pixel_lib.to_uint8(model.pixels.to_float(np.asarray(images[part])))
    return levels


def read(directory: str | Path, split: str = "") -> dict[str, Any] | None:
    """The content of the file that `evaluate` wrote for a split; None if there is none.

    Raises:
        UserError: the directory is no workdir, or the file is damaged.
    """
    directory = files.user_path(directory, "--workdir")
    own = identity.configuration(directory).dataset.eval_split
    split = split or own
    # An older version left out the hash, so its file may be of another split.
    for name in dict.fromkeys((_name(split, own), _readable(split))):
        content = files.read_json(directory / f"{name}.json")
        if content is not None and content.get("split") == split:
            return content
    return None


def _name(split: str, own_split: str) -> str:
    """Of the file and the folder of an evaluation; no other split has it."""
    if split == own_split:
        return "evaluation"
    digest = hashlib.sha256(split.encode()).hexdigest()[:8]
    return f"{_readable(split)[:80]}_{digest}"


def _readable(split: str) -> str:
    return re.sub(r"\W+", "_", f"evaluation_{split}")


def likelihood(
    model: Trained,
    training: Pixels,
    held_out: Pixels,
    num_samples: int,
    loaded: Sequence[Fitted] = (),
) -> dict[str, Any]:
    """Returns `bounds`, `floors`, `reconstruction`, `latents` and `priors` of held-out images.

    Bounds are in nats an image and bits/dim; K = `num_samples` of the importance-weighted one.
    `priors` are the bounds with each of the `loaded` samplers in the prior's place, where it has a
    density.
    """
    config, variables = model.config, model.variables
    recipe = configs.recipe(config, configs.num_steps(config, len(training)), model.model)
    mesh = sharding.make_mesh()
    scale = model.scale
    if scale is None:
        scale = bounds.calibrate(recipe, variables, training, mesh)
    terminal.say("  ELBO and reconstructions")
    found, latents = reconstruction.evaluate(recipe, variables, held_out, scale, mesh)
    terminal.say(f"  importance-weighted bound, K={num_samples}")
    weighted, others = bounds.estimate_importance_weighted(
        recipe,
        variables,
        held_out,
        scale,
        mesh,
        num_samples=num_samples,
        priors={
            name: bounds.OtherPrior(sampler.log_prob, sampler.density(params), sampler.exact)
            for name, sampler, params in loaded
            if isinstance(sampler, samplers.Density)
        },
    )
    terminal.say("  linear floors")
    size = models.num_params(variables["params"])["decoder"]
    return {
        **found,
        "bounds": {**found["bounds"], **weighted, **bounds.sigma(recipe.likelihood, scale)},
        "floors": closed_forms.floors(recipe, training, held_out, mesh, size),
        "latents": latents,
        "priors": others,
    }


def compare(sets: dict[str, Pixels], real: RealImages, pictures: Path) -> dict[str, Any]:
    """Compares sets of images with held-out ones, in pixels and, if there are any, in features.

    Args:
        sets: images by name, uint8 ``[n, h, w, c]``.
        real: the images that they are compared with.
        pictures: a directory for `nearest_NAME_SPACE.png`: samples, each above its nearest training
            image.

    Returns:
        For each set `pixels` and `features`, each a `Comparison`, and `memorisation` in both.
    """
    extractor = real.extractor
    # How sets of samples and how real images become points.
    spaces: dict[str, tuple[Any, Any]] = {"pixels": (_unchanged, _unchanged)}
    if extractor is not None:
        embed = functools.partial(extractor.__call__, progress=_progress)
        kept = functools.partial(feature_lib.kept, extractor, directory=real.cache)
        spaces["features"] = embed, functools.partial(kept, progress=_progress)
    key = seeds.key(real.seed)
    result: dict[str, Any] = {name: {"memorisation": {}} for name in sets}
    for space, (embed, embed_real) in spaces.items():
        held_out, training = embed_real(real.held_out), embed_real(real.training)
        from_held_out = neighbours.nearest(held_out, training).distances
        for name, images in sets.items():
            terminal.say(f"  {name}: distances of {space}")
            points = training[: len(images)] if name == FLOOR else embed(images)
            found = result[name]
            if extractor is None or space == "pixels":
                found[space] = comparison.compare_pixels(
                    key, images, held_out, reference=real.split
                )
            else:
                found[space] = comparison.compare_features(
                    key, extractor, points, held_out, reference=real.split
                )
            if name == FLOOR:
                continue  # each is its own nearest training image
            nearest = neighbours.nearest(points, training)
            found["memorisation"][space] = neighbours.memorisation(
                key, nearest.distances, from_held_out
            )
            neighbour = np.asarray(real.training[nearest.indices[:_SHOWN]])
            picture = grids.pairs(images[:_SHOWN], neighbour)
            image_files.save_picture(pictures / f"nearest_{name}_{space}.png", picture)
    return result


def _unchanged(images: Pixels) -> Pixels:
    return images


def _progress(batches: Iterable[int]) -> Iterable[int]:
    return tqdm.tqdm(
        batches, desc="features", unit=" batches", disable=None, leave=False, file=terminal.stderr()
    )
