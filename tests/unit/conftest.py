"""What the unit tests share: a small image set, its shards, and empty checkpoint stores."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ganscale.checkpoint import CheckpointStore
from ganscale.data.building import build_shards
from ganscale.data.shards import ShardSet
from ganscale.data.sources import SourceSpec
from tests.support.checkpoints import s3_bucket

CLASS_SIZES = {"ant": 11, "bee": 9, "cow": 10, "dog": 7}

LabelledImage = tuple[np.ndarray[Any, np.dtype[np.uint8]], int]


@pytest.fixture(scope="session")
def images() -> list[LabelledImage]:
    """37 noise images of 16x16 with labels of four classes, in the order of the source."""
    labels = [label for label, size in enumerate(CLASS_SIZES.values()) for _ in range(size)]
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8)
    return list(zip(pixels, labels, strict=True))


@pytest.fixture(scope="session")
def image_folder(images: list[LabelledImage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as PNGs in class folders."""
    folder = tmp_path_factory.mktemp("images")
    names = list(CLASS_SIZES)
    for number, (image, label) in enumerate(images):
        path = folder / names[label] / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture(scope="session")
def built_set(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The images as four shards; not to be changed, see `own_set`."""
    spec = SourceSpec("files", str(image_folder))
    return build_shards(spec, tmp_path_factory.mktemp("shards") / "set", num_shards=4)


@pytest.fixture(scope="session")
def array_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 arrays of float32, (16, 16) or (1, 16, 16), as .npy in the folders of two classes."""
    folder = tmp_path_factory.mktemp("arrays")
    random = np.random.default_rng(1)
    for number in range(41):
        path = folder / ("low" if number % 3 else "high") / f"{number:03d}.npy"
        path.parent.mkdir(exist_ok=True)
        shape = (16, 16) if number % 2 else (1, 16, 16)
        np.save(path, random.normal(-40, 12, shape).astype(np.float32))
    return folder


@pytest.fixture(scope="session")
def array_set(array_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The arrays as four shards; not to be changed."""
    spec = SourceSpec("files", str(array_folder))
    return build_shards(spec, tmp_path_factory.mktemp("shards") / "arrays", num_shards=4)


@pytest.fixture
def own_set(built_set: ShardSet, tmp_path: Path) -> ShardSet:
    """A copy of the shard set that a test may damage."""
    root = tmp_path / "own"
    shutil.copytree(built_set.location, root)
    return ShardSet.load(root)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an S3 bucket."""
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    """An empty one, of either kind."""
    if request.param == "directory":
        return CheckpointStore(tmp_path / "run")
    return CheckpointStore(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


@pytest.fixture
def local(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run")
