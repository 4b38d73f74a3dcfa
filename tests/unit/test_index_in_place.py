"""WebDataset tars that are there already are trained on as they are, or refused by name."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

from ganscale.data.building import index_shards
from ganscale.data.reader import ShardImages
from ganscale.data.shards import INDEX_NAME, SAMPLES_NAME, ShardSet, verify_shards
from ganscale.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("builds_here")

Pixels = NDArray[np.uint8]
LENGTHS = {"b-000.tar": 1, "a-000.tar": 7, "c.tar": 4}
"""Samples of each tar; a-000 is the first by name."""


def encoded(channels: int = 3, kind: str = "png", seed: int = 0, side: int = 16) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (side, side, channels), dtype=np.uint8).squeeze()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="jpeg" if kind == "jpg" else kind)
    return buffer.getvalue()


def by_pillow(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def write_tar(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)


def write_tars(
    folder: Path, kind: str = "png", channels: int = 3, labels: bool = True
) -> list[tuple[bytes, int]]:
    """Tars of unequal length; returns (encoded image, label) in the order of the tars' names."""
    written: list[tuple[bytes, int]] = []
    for name in sorted(LENGTHS):
        samples: list[dict[str, Any]] = []
        for _ in range(LENGTHS[name]):
            number = len(written)
            data, label = encoded(channels, kind, number), number * 3 % 5
            sample: dict[str, Any] = {"__key__": f"some/where/{number:03d}", kind: data}
            if labels:
                sample["cls"] = str(label).encode()
            samples.append({**sample, "json": b'{"caption": "ignored"}'})
            written.append((data, label if labels else -1))
        write_tar(folder / name, samples)
    return written


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*"))}


def refusal(folder: Path, kind: type[Exception] = DataError, **arguments: Any) -> str:
    """The message with which a folder is refused, in which case nothing is left there."""
    before = hashes(folder)
    with pytest.raises(kind) as error:
        index_shards(folder, **arguments)
    assert hashes(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == list(before)
    message = str(error.value)
    assert str(folder) in message or kind is ConfigError
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["png", "jpg", "jpeg", "webp", "bmp"])
@pytest.mark.parametrize("labels", [True, False])
def test_tars_are_read_as_they_are(tmp_path: Path, kind: str, labels: bool) -> None:
    written = write_tars(tmp_path / "tars", kind, labels=labels)
    before = hashes(tmp_path / "tars")
    counts: list[int] = []
    index_shards(tmp_path / "tars", progress=counts.append)
    assert sorted(counts) == [1, 4, 7]
    after = hashes(tmp_path / "tars")
    assert {name: after[name] for name in LENGTHS} == before
    assert set(after) == {*LENGTHS, INDEX_NAME, SAMPLES_NAME}

    shard_set = ShardSet.load(tmp_path / "tars")
    assert [(s.name, s.num_samples) for s in shard_set.shards] == sorted(LENGTHS.items())
    assert [s.sha256 for s in shard_set.shards] == [before[name] for name in sorted(LENGTHS)]
    assert shard_set.image_shape == (3, 16, 16)
    assert shard_set.classes == (tuple("01234") if labels else ())
    assert shard_set.samples["label"].tolist() == [label for _, label in written]
    images = ShardImages(shard_set).read(np.arange(len(written)))
    assert images.damaged == ()
    expected = np.stack([by_pillow(data) for data, _ in written])
    assert np.array_equal(images.pixels.numpy(), expected)
    values = expected.transpose(0, 2, 3, 1).reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(shard_set.pixel_mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(shard_set.pixel_std, values.std(0), rtol=1e-9)
    assert verify_shards(shard_set) == []


@pytest.mark.parametrize("channels", [1, 4])
def test_gray_and_rgba_tars_are_read(tmp_path: Path, channels: int) -> None:
    written = write_tars(tmp_path / "tars", channels=channels)
    shard_set = index_shards(tmp_path / "tars")
    assert shard_set.image_shape == (channels, 16, 16)
    images = ShardImages(shard_set).read(np.arange(len(written))[::-1].copy())
    expected = np.stack([by_pillow(data) for data, _ in reversed(written)])
    assert np.array_equal(images.pixels.numpy(), expected)


def test_indexing_again_gives_the_same_index(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    first = index_shards(tmp_path / "tars")
    before = hashes(tmp_path / "tars")
    (tmp_path / "tars" / INDEX_NAME).unlink()
    again = index_shards(tmp_path / "tars")
    assert hashes(tmp_path / "tars") == before
    assert again.digest == first.digest


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_samples_are_those_that_webdataset_finds(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    shard_set = index_shards(tmp_path / "tars")
    urls = [str(path) for path in sorted((tmp_path / "tars").glob("*.tar"))]
    theirs = list(wds.WebDataset(urls, shardshuffle=False))
    assert [int(sample["cls"]) for sample in theirs] == shard_set.samples["label"].tolist()
    ours = ShardImages(shard_set).read(np.arange(shard_set.num_samples)).pixels.numpy()
    assert np.array_equal(ours, np.stack([by_pillow(sample["png"]) for sample in theirs]))


def test_an_index_that_is_there_is_kept(tmp_path: Path) -> None:
    """It has class names that the tars have not."""
    write_tars(tmp_path / "tars")
    names = ["ant", "bee", "cow", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]
    shard_set = index_shards(tmp_path / "tars", class_names=names)
    assert shard_set.classes == tuple(names)
    before = hashes(tmp_path / "tars")
    assert "has an index already" in refusal(tmp_path / "tars", ConfigError)
    assert hashes(tmp_path / "tars") == before


LABELS = {
    "some missing": ([0, None, 2, None], "2 of 4 samples have no label, such as a.tar: 1"),
    "a time stamp": ([0, 1, 2, 1732600000], "1 of 4 samples have a label of 1000 or more"),
    "just beyond": ([0, 1, 2, 1000], "such as 1000 of b.tar: 3"),
}


@pytest.mark.parametrize(("labels", "words"), LABELS.values(), ids=LABELS.keys())
def test_labels_that_cannot_be_class_numbers_are_refused_with_their_count(
    tmp_path: Path, labels: list[int | None], words: str
) -> None:
    samples = [
        {"__key__": str(n), "png": encoded(), **({} if label is None else {"cls": b"%d" % label})}
        for n, label in enumerate(labels)
    ]
    write_tar(tmp_path / "a.tar", samples[:2])
    write_tar(tmp_path / "b.tar", samples[2:])
    before = hashes(tmp_path)
    assert words in refusal(tmp_path)
    assert hashes(tmp_path) == before


def test_a_small_part_of_a_set_of_many_classes_is_indexed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [{"__key__": "0", "png": encoded(), "cls": b"999"}])
    assert len(index_shards(tmp_path).classes) == 1000


def test_what_is_left_out_of_tars_is_counted(tmp_path: Path) -> None:
    hidden = {"__key__": "._0", "png": b"no image"}
    sample = {"__key__": "0", "png": encoded(), "txt": b"a cat", "json": b"{}"}
    write_tar(tmp_path / "a.tar", [hidden, sample])
    lines: list[str] = []
    shard_set = index_shards(tmp_path, notify=lines.append)
    assert shard_set.num_samples == 1
    assert lines == [
        "Converted or left out: hidden or system files: 1, such as a.tar: ._0.png; "
        "fields .json of samples: 1, such as a.tar: 0.json; "
        "fields .txt of samples: 1, such as a.tar: 0.txt"
    ]


def test_compressed_tars_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"")
    assert "gunzip" in refusal(tmp_path)


@pytest.mark.parametrize(("num_streams", "expected"), [(None, 3), (1, 1), (2, 2), (3, 3)])
def test_streams_are_as_many_as_tars_or_as_asked_for(
    tmp_path: Path, num_streams: int | None, expected: int
) -> None:
    write_tars(tmp_path / "tars")
    shard_set = index_shards(tmp_path / "tars", num_streams=num_streams, split="test")
    assert shard_set.num_streams == expected
    assert shard_set.split == "test"


@pytest.mark.parametrize("num_streams", [0, 4])
def test_streams_without_tars_are_refused(tmp_path: Path, num_streams: int) -> None:
    write_tars(tmp_path / "tars")
    message = refusal(tmp_path / "tars", ConfigError, num_streams=num_streams)
    assert "--num-streams must be in 1..3" in message


Damage = Callable[[bytes], bytes]


def header_of(data: bytes, number: int) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()[number].offset


def with_a_hole(data: bytes) -> bytes:
    start = header_of(data, 6)
    return data[:start] + bytes(1000) + data[start + 1000 :]


def with_a_flipped_header(data: bytes) -> bytes:
    at = header_of(data, 6) + 3
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def with_a_flipped_pixel(data: bytes) -> bytes:
    at = data.index(b"IDAT", header_of(data, 6)) + 60
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE: dict[str, Damage] = {
    "cut in the middle": lambda data: data[: len(data) // 2],
    "cut between members": lambda data: data[: header_of(data, 6)],
    "hole over a header": with_a_hole,
    "flipped bit in a header": with_a_flipped_header,
    "flipped bit in an image": with_a_flipped_pixel,
    "empty": lambda data: b"",
    "HTML": lambda data: b"<!DOCTYPE html>" * 100,
    "no samples": lambda data: bytes(10240),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_tar_is_named_and_nothing_is_written(tmp_path: Path, damage: Damage) -> None:
    write_tars(tmp_path / "tars")
    path = tmp_path / "tars" / "c.tar"
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in refusal(tmp_path / "tars")


def test_a_damaged_tar_does_not_cost_the_index_that_was_there(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    index_shards(tmp_path / "tars")
    path = tmp_path / "tars" / "c.tar"
    path.write_bytes(path.read_bytes()[:1024])
    refusal(tmp_path / "tars", ConfigError)
    assert ShardSet.load(tmp_path / "tars").num_samples == sum(LENGTHS.values())


UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "another size": ({"png": encoded(side=32)}, "others have"),
    "another kind": ({"png": encoded(channels=1)}, "others have"),
    "no image": ({"png": b"no image"}, "not an image"),
    "a cut image": ({"png": encoded()[:300]}, "cannot be decoded"),
    "a label that is no number": ({"png": encoded(), "cls": b"cat"}, "not a class number"),
    "a label beyond the index": ({"png": encoded(), "cls": b"99999999999"}, "class number"),
    "two images": ({"png": encoded(), "jpg": encoded(kind="jpg")}, "needs one image"),
    "only a label": ({"cls": b"1"}, "needs one image"),
}


@pytest.mark.parametrize(("sample", "words"), UNUSABLE.values(), ids=UNUSABLE.keys())
@pytest.mark.parametrize("first", [True, False])
def test_a_sample_that_cannot_be_trained_on_is_named(
    tmp_path: Path, sample: dict[str, Any], words: str, first: bool
) -> None:
    good = [{"__key__": f"good{n}", "png": encoded(seed=n), "cls": b"0"} for n in range(3)]
    odd = {"__key__": "odd", **sample}
    write_tar(tmp_path / "a.tar", [odd, *good] if first else [*good, odd])
    message = refusal(tmp_path)
    assert f"{tmp_path / 'a.tar'}" in message
    assert words in message
    if "others have" not in message or not first:
        assert "odd" in message


def test_the_size_is_refused_where_no_model_takes_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [{"__key__": "odd", "png": encoded(side=24)}])
    message = refusal(tmp_path)
    assert "sample odd is 24x24" in message
    assert "power of two" in message


def test_tars_that_disagree_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """Each tar agrees in itself."""
    write_tar(tmp_path / "a.tar", [{"__key__": "0", "png": encoded(side=16)}])
    write_tar(tmp_path / "b.tar", [{"__key__": "1", "png": encoded(side=32)}])
    before = hashes(tmp_path)
    with pytest.raises(DataError, match="others have") as error:
        index_shards(tmp_path)
    assert hashes(tmp_path) == before
    message = str(error.value)
    assert "--resolution" in message
    assert "b.tar" in message


@pytest.mark.parametrize("name", ["absent", "empty", "loose images"])
def test_a_folder_without_tars_is_named(tmp_path: Path, name: str) -> None:
    if name != "absent":
        (tmp_path / name).mkdir()
    if name == "loose images":
        (tmp_path / name / "0.png").write_bytes(encoded())
    with pytest.raises(DataError, match="no .tar files|no such folder") as error:
        index_shards(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
