"""How fast a shard set is read, compared with plain webdataset and torchvision in the same run.

    python -m benchmarks.data_reading data/cifar10-train

Absolute speeds depend on what else the machine is doing; the ratios to the first row are what to
compare. Everything runs in one process. The operating system's page cache serves what is read
twice, for all ways of reading alike.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from ganscale.data.decoded_cache import DecodedImages, DevicePixels, HostPixels
from ganscale.data.encodings import NPY
from ganscale.data.layout import ARRAY_SUFFIX, IMAGE_SUFFIXES
from ganscale.data.order import Order
from ganscale.data.reader import BatchReader, ImageReader, ReadAhead, ShardImages
from ganscale.data.shard_cache import CachedStore
from ganscale.data.shards import ShardSet
from ganscale.storage import LocalStore, ObjectStore

BATCH_SIZE = 128
_FOLDER_IMAGES = 2000


def main() -> None:
    """Measure every way of reading a set on one core, and print a row for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("shards", help="folder or URL of a shard set")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each way")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shard_set, base = ShardSet.load(given.shards), None
    pixel_bytes = math.prod(shard_set.image_shape) * shard_set.values.numpy_dtype.itemsize
    print(f"{'':40} {'images/s':>12} {'MB/s':>9} {'ratio':>8}")
    for name, batches in _ways(shard_set, torch.device(given.device)):
        speed = _images_per_second(batches, given.seconds)
        base = base or speed
        print(f"{name:40} {speed:12,.0f} {speed * pixel_bytes / 1e6:9,.1f} {speed / base:8.1f}")


def _ways(shard_set: ShardSet, device: torch.device) -> Iterator[tuple[str, Iterator[int]]]:
    """Names, and endless iterators over the sizes of the batches that were read.

    Plain webdataset with PIL and torchvision's ImageFolder with a DataLoader come first if the set
    lies in a local directory.
    """
    if isinstance(shard_set.store, LocalStore):
        is_array = shard_set.encoding == NPY
        yield f"webdataset, {'numpy' if is_array else 'PIL'}", _plain_webdataset(shard_set)
        if not is_array:
            with tempfile.TemporaryDirectory(prefix="ganscale-") as folder:
                _unpack(shard_set, Path(folder))
                yield "torchvision ImageFolder, DataLoader", _image_folder(Path(folder))
    stream = ShardImages(shard_set)
    for threads in (1, 2):
        name = f"ganscale, streaming, {threads} thread{'s' if threads > 1 else ''}"
        yield name, _ganscale(shard_set, stream, threads)
    if isinstance(shard_set.store, ObjectStore):
        with tempfile.TemporaryDirectory(prefix="ganscale-") as folder:
            store = CachedStore(shard_set.store, shard_set.shards, Path(folder), limit_bytes=None)
            store.prefetch([shard.name for shard in shard_set.shards])
            cached = ShardImages(shard_set, store)
            yield "ganscale, shards in cache_dir, 2 threads", _ganscale(shard_set, cached, 2)
    shape, values = (shard_set.num_samples, *shard_set.image_shape), shard_set.values
    host = HostPixels(shape, rank=0, exchange=lambda value: [value], dtype=values.numpy_dtype)
    yield "ganscale, cache ram", _ganscale(shard_set, _filled(stream, host))
    on_device = DevicePixels(shape, device, values.torch_dtype)
    yield f"ganscale, cache device ({device})", _ganscale(shard_set, _filled(stream, on_device))


def _images_per_second(batches: Iterator[int], seconds: float) -> float:
    next(batches)  # starts threads and opens files, which the speed is not about
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        count += next(batches)
    return count / elapsed


def _ganscale(shard_set: ShardSet, images: ImageReader, num_threads: int = 1) -> Iterator[int]:
    sizes = [shard.num_samples for shard in shard_set.shards]
    order = Order(sizes, num_streams=shard_set.num_streams, window=1024, seed=0)
    ahead = ReadAhead(num_threads=num_threads)
    reader = BatchReader(shard_set, order, images, rank=0, world_size=1, ahead=ahead)
    with closing(reader.batches(0, BATCH_SIZE)) as batches:
        for batch in batches:
            yield len(batch.images)


def _filled(reader: ImageReader, pixels: HostPixels | DevicePixels) -> DecodedImages:
    # Before the clock starts: the rate of a cache is that of the epochs after the first one.
    cache = DecodedImages(reader, pixels)
    for first in range(0, len(pixels), 1024):
        cache.read(np.arange(first, min(first + 1024, len(pixels))))
    return cache


def _plain_webdataset(shard_set: ShardSet) -> Iterator[int]:
    urls = [f"{shard_set.location}/{shard.name}" for shard in shard_set.shards]
    images = ";".join((*IMAGE_SUFFIXES, ARRAY_SUFFIX))
    while True:
        samples: Iterable[Any] = (
            wds.WebDataset(urls, shardshuffle=False, empty_check=False)
            .decode("pil")
            .to_tuple(images)
            .map_tuple(lambda image: torch.from_numpy(np.array(image)))
            .batched(BATCH_SIZE, partial=False)
        )
        for (batch,) in samples:
            yield len(batch)


def _image_folder(folder: Path) -> Iterator[int]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    dataset = ImageFolder(str(folder), transform=PILToTensor())
    while True:
        for images, _ in DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True):
            yield len(images)


def _unpack(shard_set: ShardSet, folder: Path) -> None:
    """Write the set's first images as files in class folders, as torchvision reads them."""
    samples = np.arange(min(_FOLDER_IMAGES, shard_set.num_samples))
    contents = shard_set.store.read_spans(shard_set.spans(samples))
    labels = shard_set.samples["label"][samples].tolist()
    for number, (data, label) in enumerate(zip(contents, labels, strict=True)):
        if isinstance(data, Exception):
            raise data
        path = folder / f"class{label}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
