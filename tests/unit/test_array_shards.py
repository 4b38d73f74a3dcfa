"""Sets of arrays of floats go the way of images: the same shards, index, order and errors."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

from ganscale.data.building import build_shards, index_shards
from ganscale.data.order import Order
from ganscale.data.reader import BatchReader, DamagedSample, ShardImages
from ganscale.data.resolve_source import resolve_source
from ganscale.data.shards import INDEX_NAME, ShardSet, verify_shards
from ganscale.data.sources import SourceSpec
from ganscale.data.spectrograms import CLASSES, RESOLUTION, SAMPLE_RATE, magnitudes, spectrogram
from ganscale.data.values import PIXELS, ValueRange
from ganscale.errors import ConfigError, DataError
from tests.unit.test_arrays import noise, saved

pytestmark = pytest.mark.usefixtures("builds_here")

Floats = NDArray[np.float32]


def members(shard_set: ShardSet) -> dict[str, bytes]:
    """What tarfile finds in all shards."""
    found = {}
    for shard in shard_set.shards:
        with tarfile.open(f"{shard_set.location}/{shard.name}") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def order_of(shard_set: ShardSet) -> Order:
    sizes = [shard.num_samples for shard in shard_set.shards]
    return Order(sizes, num_streams=shard_set.num_streams, window=5, seed=3)


def folder_spec(folder: Path) -> SourceSpec:
    spec, _ = resolve_source(str(folder), "train", download_dir=folder)
    return spec


def small_folder(folder: Path, *arrays: bytes) -> SourceSpec:
    folder.mkdir(parents=True)
    for number, data in enumerate(arrays):
        (folder / f"{number}.npy").write_bytes(data)
    return folder_spec(folder)


def test_shards_hold_the_source_s_bytes_and_the_index_says_what_they_are(
    array_folder: Path, array_set: ShardSet
) -> None:
    files = sorted(array_folder.glob("*/*.npy"))
    found = members(array_set)
    arrays = []
    for number, file in enumerate(files):
        data = found[f"{number:06d}.npy"]
        assert data == file.read_bytes()
        assert found[f"{number:06d}.cls"] == str(["high", "low"].index(file.parent.name)).encode()
        arrays.append(np.load(io.BytesIO(data)).reshape(1, 16, 16))
    values = np.stack(arrays).astype(np.float64)
    index = json.loads(Path(array_set.location, INDEX_NAME).read_text())
    assert index["format"] == 3
    assert index["values"] == {"dtype": "float32", "low": values.min(), "high": values.max()}
    assert index["image_shape"] == [1, 16, 16]
    assert index["classes"] == ["high", "low"]
    np.testing.assert_allclose(index["pixel_mean"], values.mean(), rtol=1e-12)
    np.testing.assert_allclose(index["pixel_std"], values.std(), rtol=1e-9)
    assert array_set.values == ValueRange("float32", values.min(), values.max())
    assert verify_shards(array_set) == []


def test_the_index_of_images_is_what_it_was(built_set: ShardSet) -> None:
    index = json.loads(Path(built_set.location, INDEX_NAME).read_text())
    assert index["format"] == 2
    assert "values" not in index
    assert built_set.values == PIXELS


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_itself_reads_what_the_reader_reads(array_set: ShardSet) -> None:
    urls = [f"{array_set.location}/{shard.name}" for shard in array_set.shards]
    plain = [*wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("npy", "cls")]
    slots = order_of(array_set).batch(31, 16)
    reader = BatchReader(
        array_set, order_of(array_set), ShardImages(array_set), rank=0, world_size=1
    )
    batch = reader.read(31, 16)
    assert batch.images.dtype == torch.float32
    assert batch.images.shape == (16, 1, 16, 16)
    for sample, image, label in zip(slots.samples, batch.images, batch.labels, strict=True):
        array, cls = plain[sample]
        assert np.array_equal(image.numpy(), array.reshape(1, 16, 16))
        assert label == cls


def test_a_range_of_one_s_own_is_kept_and_leaves_the_values_alone(
    array_folder: Path, array_set: ShardSet, tmp_path: Path
) -> None:
    spec = folder_spec(array_folder)
    built = build_shards(spec, tmp_path / "set", num_shards=4, value_range=(-60, -10.5))
    assert built.values == ValueRange("float32", -60, -10.5)
    assert built.shards == array_set.shards
    assert built.digest != array_set.digest
    batch = ShardImages(built).read(np.arange(20)).pixels
    assert batch.min() < -60
    images = built.values.to_network(batch)
    assert images.min() == -1
    assert images.max() == 1


def test_ranges_that_cannot_be_are_refused(
    image_folder: Path, array_folder: Path, tmp_path: Path
) -> None:
    for folder, words in ((image_folder, "is for arrays"), (array_folder, "lesser value first")):
        with pytest.raises(ConfigError, match=f"--value-range .*{words}"):
            build_shards(folder_spec(folder), tmp_path / "set", num_shards=4, value_range=(1, 0))
    assert not (tmp_path / "set").exists()


def test_arrays_all_of_one_value_are_refused(tmp_path: Path) -> None:
    flat = saved(np.full((16, 16), 3.5, np.float32))
    with pytest.raises(DataError, match=r"range from 3\.5 to 3\.5.*nothing can be learnt"):
        build_shards(small_folder(tmp_path / "arrays", flat, flat), tmp_path / "set", num_shards=2)


NOT_FINITE = noise()
NOT_FINITE[0, 1, 1] = np.nan


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (saved(NOT_FINITE), r"1\.npy has 1 values that are no finite float32"),
        (saved(noise((8, 8))), r"1\.npy has \(channels, height, width\) \(1, 8, 8\), others have"),
        (saved(noise((3, 16, 16))), r"\(3, 16, 16\), others have \(1, 16, 16\)"),
        (b"no array", "1.npy is not an npy file"),
    ],
    ids=["nan", "size", "channels", "text"],
)
def test_an_array_that_cannot_be_used_is_named(tmp_path: Path, other: bytes, words: str) -> None:
    spec = small_folder(tmp_path / "arrays", saved(noise()), other)
    with pytest.raises(DataError, match=words) as error:
        build_shards(spec, tmp_path / "set", num_shards=1)
    assert str(tmp_path / "arrays") in str(error.value)
    assert "\n" not in str(error.value)


def test_arrays_that_are_not_square_are_resized_on_demand(tmp_path: Path) -> None:
    spec = small_folder(tmp_path / "arrays", *(saved(noise((40, 100), n)) for n in range(3)))
    with pytest.raises(DataError, match=r"is 100x40; .*--resolution"):
        build_shards(spec, tmp_path / "set", num_shards=1)
    built = build_shards(spec, tmp_path / "set", num_shards=1, resolution=16)
    assert built.image_shape == (1, 16, 16)
    assert ShardImages(built).read(np.arange(3)).valid.all()


def test_files_beside_images_are_not_taken_for_arrays(tmp_path: Path) -> None:
    """As before there were sets of arrays: images with an .npy beside each are images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        Image.new("L", (16, 16), number).save(folder / f"{number}.png")
        np.save(folder / f"{number}.npy", noise())
    built = build_shards(folder_spec(folder), tmp_path / "set", num_shards=1)
    assert built.values == PIXELS
    assert sorted(members(built)) == ["000000.png", "000001.png"]


def write_tar(path: Path, *samples: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with wds.TarWriter(str(path), encoder=False) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{path.stem}-{number}", **sample})


def test_tars_of_arrays_are_indexed_where_they_are(tmp_path: Path) -> None:
    """As they are: here float64 (H, W), and float16 (1, H, W) by columns."""
    arrays: list[np.ndarray[Any, Any]] = [noise((16, 16), 0)]
    arrays.append(np.asfortranarray(noise(seed=1).astype(np.float16)))
    for name, array in zip("ab", arrays, strict=True):
        write_tar(tmp_path / "tars" / f"{name}.tar", {"npy": saved(array), "cls": b"2"})
    index_shards(tmp_path / "tars", value_range=(-90, 0))
    shard_set = ShardSet.load(tmp_path / "tars")
    assert shard_set.values == ValueRange("float32", -90, 0)
    found = ShardImages(shard_set).read(np.arange(2)).pixels.numpy()
    expected = np.stack([array.astype(np.float32).reshape(1, 16, 16) for array in arrays])
    assert np.array_equal(found, expected)
    spec = SourceSpec("webdataset", str(tmp_path / "tars"))
    built = build_shards(spec, tmp_path / "built", num_shards=1)
    assert [np.load(io.BytesIO(members(built)[f"00000{n}.npy"])).tolist() for n in range(2)] == [
        expected[0].tolist(),
        expected[1].tolist(),
    ]


@pytest.mark.parametrize("num_tars", [1, 2])
def test_images_and_arrays_in_one_set_are_refused(tmp_path: Path, num_tars: int) -> None:
    png = io.BytesIO()
    Image.new("L", (16, 16)).save(png, format="PNG")
    samples = [{"png": png.getvalue()}, {"npy": saved(noise())}]
    for number in range(num_tars):
        chosen = samples if num_tars == 1 else samples[number : number + 1]
        write_tar(tmp_path / "tars" / f"{number}.tar", *chosen)
    with pytest.raises(DataError, match=r"sample \d-\d is an array of floats, .* an image"):
        index_shards(tmp_path / "tars")
    with pytest.raises(DataError, match="some samples are images and some are arrays"):
        build_shards(SourceSpec("webdataset", str(tmp_path / "tars")), tmp_path / "set")


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_damaged_array_is_named_or_skipped(
    array_set: ShardSet, tmp_path: Path, world_size: int
) -> None:
    """A flipped bit, and values that are not finite in bytes that agree with their checksum."""
    root = tmp_path / "own"
    shutil.copytree(array_set.location, root)
    samples = array_set.samples.copy()
    flipped, not_finite = array_set.spans(np.array([4, 11]))
    for span, place, value in ((flipped, -3, b"\1"), (not_finite, -4, b"\0\0\xc0\x7f")):
        data = bytearray((root / span.name).read_bytes())
        at = span.start + span.length + place
        data[at : at + len(value)] = value
        (root / span.name).write_bytes(data)
        if span is not_finite:
            samples["crc32"][11] = zlib.crc32(data[span.start : span.start + span.length])
    replace(array_set, samples=samples).save(root)
    damaged = ShardSet.load(root)
    with pytest.raises(DamagedSample, match=r"shard-0000\d\.tar: sample \d+ at byte \d+: damaged"):
        raise ShardImages(damaged).read(np.array([4])).damaged[0]
    (error,) = ShardImages(damaged).read(np.array([11])).damaged
    assert "has 1 values that are no finite float32, the first at (0, 15, 15): nan" in str(error)
    assert damaged.describe(11) in str(error)
    parts = [
        BatchReader(
            damaged,
            order_of(damaged),
            ShardImages(damaged),
            rank=rank,
            world_size=world_size,
            on_error="skip",
        ).read(0, damaged.num_samples)
        for rank in range(world_size)
    ]
    assert sum(len(part.images) for part in parts) == damaged.num_samples - 2
    assert sum(len(part.skipped) for part in parts) == 2


@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "float32", "low": 1.0, "high": 1.0},
        {"dtype": "int8", "low": 0.0, "high": 1.0},
        {"low": 0.0, "high": 1.0},
        None,
    ],
)
def test_an_index_with_a_damaged_range_is_named(
    array_set: ShardSet, tmp_path: Path, values: Any
) -> None:
    root = tmp_path / "own"
    shutil.copytree(array_set.location, root)
    index = json.loads((root / INDEX_NAME).read_text())
    (root / INDEX_NAME).write_text(json.dumps({**index, "values": values}))
    with pytest.raises(DataError, match="is damaged") as error:
        ShardSet.load(root)
    assert "\n" not in str(error.value)


def test_spectrograms_are_functions_of_split_and_index() -> None:
    first, label = spectrogram("train", 6)
    assert np.array_equal(spectrogram("train", 6)[0], first)
    assert not np.array_equal(spectrogram("test", 6)[0], first)
    assert first.dtype == np.float32
    assert (first.shape, CLASSES[label]) == ((1, 64, 64), "vowel")
    many = np.stack([spectrogram("train", index)[0] for index in range(40)])
    assert len(np.unique(many.reshape(40, -1), axis=0)) == 40
    assert many.min() >= -80
    assert -3 < many.max() < 3
    assert all(many[label::4].std(0).mean() > 3 for label in range(4))


def test_a_tone_is_a_line_at_its_frequency() -> None:
    """Bins are 62.5 Hz apart, the highest first; a Hann window lets half into the next ones."""
    time = np.arange((RESOLUTION + 1) * 64) / SAMPLE_RATE
    found = magnitudes(0.5 * np.sin(2 * np.pi * 1000 * time))
    row = RESOLUTION - 1000 * 128 // SAMPLE_RATE
    np.testing.assert_allclose(found[row], 0.5, rtol=1e-12)
    np.testing.assert_allclose(found[[row - 1, row + 1]], 0.25, rtol=1e-12)
    assert np.abs(np.delete(found, [row - 1, row, row + 1], axis=0)).max() < 1e-12


def test_transforms_are_torch_s() -> None:
    signal = np.random.default_rng(0).standard_normal((RESOLUTION + 1) * 64)
    window = torch.hann_window(128, periodic=True, dtype=torch.float64)
    spectra = torch.stft(
        torch.from_numpy(signal), 128, 64, window=window, center=False, return_complex=True
    )
    expected = spectra.abs().flip(0)[:64] / (window.sum() / 2)
    np.testing.assert_allclose(magnitudes(signal), expected.numpy(), rtol=1e-9)
