"""Statistics of well-known references that ship with the package, so that nobody extracts them.

A file in `statistics/` holds the mean and the covariance of one extractor's features of one set of
images. It is used only for exactly those: it names the extractor by its digest and the images by a
digest of their content, which depends neither on their order nor on how they are stored. So shards
built from PNGs, from CIFAR-10's published pickles, and a folder or archive of PNGs all match.
`python -m benchmarks.reference_statistics` writes such a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from ganscale.evaluation.distributions.blocks import BLOCK, map_blocks
from ganscale.evaluation.image_sets import ImageSet
from ganscale.metrics.extractors import FeatureExtractor
from ganscale.metrics.statistics import Moments
from ganscale.world import World


@dataclass(frozen=True)
class PrecomputedStatistics:
    """The header of a file of statistics; `moments` reads the rest."""

    path: Path
    name: str
    """A readable name of the images, such as "CIFAR-10's training images"."""
    extractor_digest: str
    content_digest: str
    count: int
    shape: tuple[int, int, int]

    @classmethod
    def load(cls, path: Path) -> PrecomputedStatistics:
        """Read the header of a file of statistics, without the statistics."""
        with safe_open(path, "pt") as file:
            header = file.metadata()
        channels, height, width = map(int, header["shape"].split(","))
        return cls(
            path=path,
            name=header["name"],
            extractor_digest=header["extractor_digest"],
            content_digest=header["content_digest"],
            count=int(header["count"]),
            shape=(channels, height, width),
        )

    def save(self, moments: Moments) -> None:
        """Write the file: the mean in float64, the covariance's upper triangle in float32.

        Rounding the covariance moves a Frechet distance by about 1e-6 of itself, far less than
        features differ between kinds of machines, and halves the file.
        """
        d = len(moments.mean)
        # 2048 features have a covariance of 32 MiB in float64; its upper triangle takes 8 MiB in
        # float32.
        upper = moments.covariance[tuple(torch.triu_indices(d, d))].float()
        header = {
            "name": self.name,
            "extractor_digest": self.extractor_digest,
            "content_digest": self.content_digest,
            "count": str(self.count),
            "shape": ",".join(map(str, self.shape)),
        }
        save_file({"mean": moments.mean, "covariance_upper": upper}, self.path, header)

    def moments(self) -> Moments:
        """Count, mean (d,) and scatter (d, d) of all the images, float64."""
        tensors = load_file(self.path)
        mean = tensors["mean"]
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        rows, columns = torch.triu_indices(len(mean), len(mean))
        # The covariance is symmetric, and half of it is stored.
        covariance[rows, columns] = covariance[columns, rows] = tensors["covariance_upper"].double()
        return Moments(self.count, mean, covariance * (self.count - 1))


def precomputed_candidates(
    images: ImageSet, extractor: FeatureExtractor
) -> Iterator[PrecomputedStatistics]:
    """Included statistics whose extractor, number and shape of images fit.

    They are of these images if their content digest is, too.
    """
    # Number and shape are compared first, since the digest of the content reads every image.
    folder = Path(str(resources.files("ganscale.evaluation.distributions") / "statistics"))
    for path in sorted(folder.glob("*.safetensors")):
        known = PrecomputedStatistics.load(path)
        if (known.extractor_digest, known.count, known.shape) == (
            extractor.digest,
            len(images),
            images.shape,
        ):
            yield known


def content_digest(
    images: ImageSet,
    world: World,
    *,
    progress: Callable[[int], None] = lambda num_images: None,
) -> str:
    """sha256 over the sorted sha256 of every image's pixels, on all ranks alike.

    Sets with equal digests hold the same images, in any order and however they are encoded. An
    image's pixels are its uint8 values in the order (channel, row, column). All ranks share the
    work; about 8,000 small PNGs a second are decoded on one core. Raises `DataError` on all ranks
    if an image cannot be read.
    """

    # Hashes are gathered as bytes, 32 an image, so that ranks need not exchange pixels.
    def hashes(indices: NDArray[np.int64]) -> Tensor:
        block = np.zeros((BLOCK, 32), dtype=np.uint8)
        if len(indices):
            for row, pixels in zip(block, images.read(indices).numpy(), strict=False):
                row[:] = np.frombuffer(hashlib.sha256(pixels.tobytes()).digest(), dtype=np.uint8)
        return torch.from_numpy(block)

    parts = []
    for where, block in map_blocks(hashes, images, world):
        parts += [row.tobytes() for row in block.numpy()]
        progress(len(where))
    # Sorted, so that folders and shards of one set agree whatever their order.
    digests = [hashlib.sha256(b"".join(sorted(parts))).hexdigest()]
    dist.broadcast_object_list(digests, src=0)
    return digests[0]
