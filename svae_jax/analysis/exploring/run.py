"""A trained run to play with."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jaxtyping import Bool, Float, Num, UInt8

from svae_jax import files, latents, samplers, seeds, sizes, terminal
from svae_jax import pixels as pixel_lib
from svae_jax.analysis import fitted, trained
from svae_jax.analysis.exploring import filling, locality, networks, paths
from svae_jax.analysis.exploring import images as image_lib
from svae_jax.analysis.exploring.filling import Filled
from svae_jax.analysis.exploring.locality import Locality
from svae_jax.analysis.fitted import Fitted
from svae_jax.analysis.trained import Trained
from svae_jax.devices import runtime
from svae_jax.errors import UserError
from svae_jax.evaluation import grids
from svae_jax.model import SpatialVAE
from svae_jax.run import workdir as workdirs
from svae_jax.samplers.conditional import Factors, HasFactors, condition

Images = Num[np.ndarray, "_b height width c"]
Latents = Float[np.ndarray, "_b h w n"]


class Encoding(NamedTuple):
    """The posteriors q(z|x) of b images.

    Attributes:
        params: their arrays by name, as `run.model.posterior` takes them.
        mean: `[b, h, w, n]`.
        stddev: the marginal standard deviation of every entry, `[b, h, w, n]`.
    """

    params: latents.Params
    mean: Latents
    stddev: Latents


class KLMap(NamedTuple):
    """KL(q(z|x) ‖ p(z)) of b images in nats, by location.

    With the standard prior, a location is given the KL of its entries' marginals, summed over the
    maps. The prior's entries are independent, so for `vector`, `naive`, `mvn` and `lowrank`, whose
    posteriors' entries are too, the locations add up to the KL. For `mvn_full` and `lowrank_full`
    they add up to less: what is left, `dependence`, is the divergence of q from the product of its
    marginals. It belongs to no single location. With a learned prior, a location is given what it
    costs once the locations before it, row by row, are known (`latents.Prior.kl_per_location`).

    Attributes:
        per_location: nats, `[b, h, w]`.
        dependence: nats that belong to no location, `[b]`; zero to rounding, but for `*_full`.
        over_image: `per_location` as an image, `[b, height, width]`: each pixel has the nats of the
            location in whose patch it lies (see `locality.owners`).
    """

    per_location: Float[np.ndarray, "b h w"]
    dependence: Float[np.ndarray, " b"]
    over_image: Float[np.ndarray, "b height width"]


@dataclasses.dataclass(frozen=True, eq=False)
class Run(Trained):
    """A trained model, and what can be done with its latents.

    Images are given in any form that `exploring.images.prepare` takes: in the units of the run's
    data, such as uint8; one or many; files or Pillow's images. Those returned have the units and
    the dtype of the run's data, `[b, height, width, channels]`; `display` makes pictures of any.
    Images are encoded to their posteriors' means; only `sample` and `fill` are random.

    Attributes:
        directory: the workdir.
    """

    directory: Path

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and maps of a latent."""
        return self.model.posterior.shape

    @property
    def samplers(self) -> list[str]:
        """The names of the samplers that are fitted; `prior` always is."""
        return [name for name in samplers.names() if fitted.is_fitted(self.directory, name)]

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`: `step`, and what was logged or evaluated at it.

        Raises:
            UserError: the file cannot be read, or is damaged.
        """
        return workdirs.read_metrics(self.directory)

    def display(self, images: Any) -> UInt8[np.ndarray, "_b height _width _c"]:
        """Pictures of images in the units of the run's data: 8 bits, grey or colour.

        The range of the run's values becomes black to white. Channels of images that have other
        than 1 or 3 stand side by side.
        """
        levels = np.asarray(pixel_lib.to_uint8(self._prepared(images)))
        return grids.side_by_side(levels)

    def encode(self, images: Any) -> Encoding:
        """The posteriors of images."""
        found = self._posteriors(images)
        return Encoding(jax.device_put(found.params), found.mean, found.stddev)

    def decode(self, z: Any) -> Images:
        """The images of latents `[h, w, n]` or `[b, h, w, n]`."""
        values = networks.decode(self.model, self.variables, self._latents(z))
        return self.pixels.from_float(values)

    def reconstruct(self, images: Any) -> Images:
        """Decodes the posteriors' means."""
        return self.decode(self._posteriors(images).mean)

    def sampler(self, name: str, **options: Any) -> Fitted:
        """A sampler of latents; see `fitted.load_sampler` for the options.

        Raises:
            UserError: it is not fitted to this checkpoint, or there is no such sampler or option.
        """
        return fitted.load_sampler(self.directory, name, self, **options)

    def sample(
        self, num: int, sampler: str | Fitted = "prior", seed: int = 0, **options: Any
    ) -> Images:
        """Draws images; number i depends on the seed and i alone.

        Args:
            num: how many, at least 1.
            sampler: one of `samplers`, or what `sampler` returns, which spares reading it again.
            seed: of the latents.
            **options: of a sampler given by name, such as `temperature` of the prior.

        Raises:
            UserError: `num` is below 1, the seed is out of range, or as `sampler`.
        """
        if num < 1:
            raise UserError(f"num must be at least 1, got {num}")
        key = seeds.key(seed)
        if isinstance(sampler, str):
            sampler = self.sampler(sampler, **options)
        return self.decode(sampler(key, num))

    def interpolate(
        self,
        a: Any,
        b: Any,
        num: int = 8,
        *,
        spherical: bool = False,
        where: Any = None,
    ) -> Images:
        """Images along a path from image a to image b, of which the reconstructions are the ends.

        Args:
            a: one image.
            b: one image.
            num: images on the path, at least 2.
            spherical: follow the arc of `paths.spherical`, not the straight line.
            where: the cells that move, as for `edit`; the others stay a's. The arc is that of these
                cells alone. All by default.
        """
        if num < 2:
            raise UserError(f"num must be at least 2, got {num}")
        start, end = self._one(a, "a"), self._one(b, "b")
        chosen = self._entries(where)
        path = paths.spherical if spherical else paths.linear
        moved = path(np.where(chosen, start, 0), np.where(chosen, end, 0), np.linspace(0, 1, num))
        return self.decode(np.where(chosen, moved, start))

    def directions(
        self, images: Any, count: int = 4, where: Any = None
    ) -> Float[np.ndarray, "k h w n"]:
        """The directions in which the latents of these images differ most, for `traverse`.

        Args:
            images: two at least; hundreds give directions of the data, few of these images.
            count: how many directions, at least 1.
            where: the entries that change, as for `edit`: one location, `run.cell(0, 2)`; one map,
                `run.feature_map(7)`; all by default.

        Returns:
            The principal directions of those entries, each as long as the standard deviation along
            it, the largest first.
        """
        means = self._posteriors(images).mean
        if len(means) < 2 or count < 1:
            raise UserError(
                f"directions need 2 images and count=1 at least, got {len(means)}, count={count}"
            )
        return paths.principal_directions(means, self._entries(where), count)

    def traverse(
        self, image: Any, direction: Any, values: Sequence[float] = (-3, -2, -1, 0, 1, 2, 3)
    ) -> Images:
        """The images of one image's latent, to which multiples of a direction are added.

        Args:
            image: one image.
            direction: `[h, w, n]`, such as one of `directions`.
            values: the multiples; in standard deviations, if the direction is one of those.
        """
        z, step = self._one(image, "image"), self._latents(direction)
        if len(step) != 1 or not len(values):
            raise UserError(f"traverse takes one direction and a value at least, got {len(step)}")
        return self.decode(z + np.asarray(values, z.dtype)[:, None, None, None] * step)

    def edit(self, a: Any, b: Any, where: Any) -> Images:
        """Puts latent cells of images b into images a.

        Args:
            a: images.
            b: as many images, or one.
            where: the cells that become b's, booleans `[h, w]`, such as `run.cell(0, 2)`; or
                `[h, w, n]` for single entries.

        Returns:
            The images; b's reconstructions where all cells are taken, a's where none is.
        """
        target, source = self._posteriors(a).mean, self._posteriors(b).mean
        if len(source) not in (1, len(target)):
            raise UserError(
                f"edit: {len(target)} images a need as many b, or one, got {len(source)}"
            )
        return self.decode(np.where(self._entries(where), source, target))

    @runtime.own_numerics()
    def fill(
        self, image: Any, mask: Any, num: int = 8, seed: int = 0, sampler: str | Fitted = ""
    ) -> Filled:
        """Inpaints what a mask hides, in closed form; see `filling` and `samplers.conditional`.

        Args:
            image: one image. What lies under the mask changes nothing.
            mask: booleans `[height, width]`, True where pixels are unknown.
            num: how many draws, at least 1; number i depends on the seed and i alone.
            seed: of the draws.
            sampler: the Gaussian of the latents: `prior` of a model with a learned prior, or
                `gaussian`. By default the first of these that there is.

        Returns:
            The draws and the image of the conditional mean, decoded as a whole: outside of the mask
            they are reconstructions. With nothing masked, all are the reconstruction.

        Raises:
            UserError: a wrong mask, a latent of one cell, or no Gaussian in which cells depend on
                each other.
        """
        if num < 1:
            raise UserError(f"num must be at least 1, got {num}")
        key, images, hidden = seeds.key(seed), self._prepared(image), np.asarray(mask)
        if len(images) != 1:
            raise UserError(f"image must be one image, got {len(images)}")
        if hidden.dtype != bool or hidden.shape != images.shape[1:3]:
            raise UserError(
                f"mask must be booleans of shape {list(images.shape[1:3])}, True where pixels are "
                f"unknown, got {hidden.dtype} of shape {list(hidden.shape)}"
            )
        cells = filling.cells_under(hidden, self.latent_shape[:2])
        conditional = condition(self._factors(sampler), cells)
        z = filling.estimate(
            lambda x: networks.encode(self.model, self.variables, x[None]).mean[0],
            lambda z: networks.decode(self.model, self.variables, z[None])[0],
            *(images[0], hidden, conditional),
        )
        drawn = conditional.sample(key, z, num)
        return Filled(self.decode(drawn), self.decode(z), cells)

    def cell(self, row: int, col: int) -> Bool[np.ndarray, "h w"]:
        """A mask of one cell, for `edit` and others; join several with `|`."""
        self._check_cell(row, col)
        mask = np.zeros(self.latent_shape[:2], bool)
        mask[row, col] = True
        return mask

    def feature_map(self, index: int) -> Bool[np.ndarray, "h w n"]:
        """A mask of one map, at all locations."""
        if not 0 <= index < self.latent_shape[2]:
            raise UserError(f"map {index} is not among the {self.latent_shape[2]} maps")
        mask = np.zeros(self.latent_shape, bool)
        mask[..., index] = True
        return mask

    def locality(self, images: Any) -> Locality:
        """How far each cell reaches, and as two numbers; the mean energy at these images' latents.

        It takes h·w·n products with the Jacobian an image, so a few images are enough.
        """
        means = self._posteriors(images).mean
        stream = terminal.stderr()
        bar = tqdm.tqdm(means, "locality", unit=" images", disable=None, leave=False, file=stream)
        energies = [locality.energy(self.model, self.variables, z) for z in bar]
        energy = np.mean(energies, axis=0)
        return locality.summarise(energy.reshape(*self.latent_shape[:2], *energy.shape[1:]))

    def reach(self, images: Any, row: int, col: int) -> Float[np.ndarray, "height width"]:
        """How far one cell reaches: its energy over the image, as in `locality`."""
        self._check_cell(row, col)
        means = self._posteriors(images).mean
        energies = [locality.energy(self.model, self.variables, z, (row, col))[0] for z in means]
        return np.mean(energies, axis=0)

    def kl_map(self, images: Any) -> KLMap:
        """The nats that each location of each image's latent costs; see `KLMap`."""
        found = self._posteriors(images)
        nats = np.asarray(found.kl_per_location)
        rows, cols = locality.owners(self.latent_shape[:2], sizes.image_shape(self.config)[:2])
        rest = np.asarray(found.kl - nats.sum((1, 2)))
        return KLMap(nats, rest, nats[:, rows][:, :, cols])

    def _factors(self, sampler: str | Fitted) -> Factors:
        """The Gaussian of the latents, for `fill`."""
        if self.latent_shape[:2] == (1, 1):
            raise UserError("fill: a latent of one cell has no other cells to fill it in from")
        if not sampler:
            sampler = "prior" if self.model.prior.shapes else "gaussian"
        if sampler == "prior" and not self.model.prior.shapes:
            raise UserError(
                "fill: the cells of the prior N(0, I) do not depend on each other; take "
                "sampler='gaussian', or train with latent.prior=tensor_normal"
            )
        loaded = self.sampler(sampler) if isinstance(sampler, str) else sampler
        if not isinstance(loaded.sampler, HasFactors):
            raise UserError(f"fill: the sampler {loaded.name} is not Gaussian")
        try:
            return loaded.sampler.factors(loaded.params)
        except ValueError as error:
            raise UserError(f"fill: {error}") from None

    def _prepared(self, images: Any) -> Float[np.ndarray, "b height width c"]:
        shape = sizes.image_shape(self.config)
        return image_lib.prepare(images, image_shape=shape, pixels=self.pixels)

    def _posteriors(self, images: Any) -> networks.Posteriors:
        return networks.encode(self.model, self.variables, self._prepared(images))

    def _one(self, image: Any, name: str) -> Float[np.ndarray, "h w n"]:
        """The latent of one image."""
        means = self._posteriors(image).mean
        if len(means) != 1:
            raise UserError(f"{name} must be one image, got {len(means)}")
        return means[0]

    def _latents(self, z: Any) -> Latents:
        given = np.asarray(z, np.float32)
        if given.shape[-3:] != self.latent_shape or given.ndim not in (3, 4) or not given.size:
            h, w, n = self.latent_shape
            raise UserError(
                f"latents: shape {list(given.shape)} is not that of this model's latents, "
                f"[{h}, {w}, {n}] or [b, {h}, {w}, {n}]"
            )
        if not np.isfinite(given).all():
            raise UserError("latents: some values are NaN or infinite")
        return given.reshape(-1, *self.latent_shape)

    def _entries(self, where: Any) -> Bool[np.ndarray, "h w n"]:
        """A mask of entries, from one of cells or of entries; None is all of them."""
        mask = np.ones(self.latent_shape, bool) if where is None else np.asarray(where)
        shapes = (self.latent_shape[:2], self.latent_shape)
        if mask.dtype != bool or mask.shape not in shapes:
            raise UserError(
                f"where must be booleans of shape {list(shapes[0])} or {list(shapes[1])}, got "
                f"{mask.dtype} of shape {list(mask.shape)}"
            )
        if mask.ndim == 2:
            mask = mask[..., None]
        return np.broadcast_to(mask, self.latent_shape)

    def _check_cell(self, row: int, col: int) -> None:
        h, w, _ = self.latent_shape
        if not (0 <= row < h and 0 <= col < w):
            raise UserError(f"cell ({row}, {col}) is not among the {h} x {w} cells")


def load(
    directory: str | Path,
    *,
    best: bool = False,
    model: SpatialVAE | None = None,
    images: Any = None,
    data_dir: str | Path = "",
) -> Run:
    """Loads a trained run, which may still be training.

    Args:
        directory: the workdir.
        best: the checkpoint with the highest `eval/elbo` instead of the newest.
        model: the model that was given to `training.loop.train`, if any.
        images: the arrays that were given to it, if any; only `images` and what is computed over
            splits needs them.
        data_dir: where the run's data set is now, if it has moved.

    Raises:
        UserError: the directory is not a workdir, or holds no intact checkpoint; or the images are
            not those of the run.
    """
    directory = files.user_path(directory, "directory")
    found = trained.load(directory, best=best, model=model, images=images, data_dir=data_dir)
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return Run(**fields, directory=directory)
