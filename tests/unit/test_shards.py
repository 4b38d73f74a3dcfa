"""Shard sets are plain WebDataset, the same bytes every time, and damage to them is found."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from ganscale.data.building import build_shards
from ganscale.data.resolve_source import resolve_source
from ganscale.data.shards import INDEX_NAME, SAMPLES_NAME, ShardSet, verify_shards
from ganscale.data.sources import SourceSpec, open_source
from ganscale.errors import ConfigError, DataError

LabelledImage = tuple[np.ndarray[Any, np.dtype[np.uint8]], int]


def hashes(root: str) -> dict[str, str]:
    files = sorted(Path(root).iterdir())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def decode(png: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


def assert_holds_every_image(
    found: dict[str, tuple[bytes, int]], images: list[LabelledImage]
) -> None:
    assert sorted(found) == [f"{i:06d}" for i in range(len(images))]
    for key, (png, label) in found.items():
        assert np.array_equal(decode(png), images[int(key)][0])
        assert label == images[int(key)][1]


@pytest.fixture(scope="module")
def zipped_set(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The same images, zipped in another order, as shards."""
    folder = tmp_path_factory.mktemp("zipped")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for path in sorted(image_folder.glob("*/*.png"), reverse=True):
            archive.write(path, path.relative_to(image_folder).as_posix())
    spec, notice = resolve_source(str(folder / "images.zip"), "train", download_dir=folder)
    assert notice is None
    return build_shards(spec, folder / "set", num_shards=4)


def test_a_rebuild_gives_the_same_bytes(
    image_folder: Path, built_set: ShardSet, tmp_path: Path
) -> None:
    spec = SourceSpec("files", str(image_folder))
    again = build_shards(spec, tmp_path / "again", num_shards=4)
    assert hashes(again.location) == hashes(built_set.location)
    assert set(hashes(again.location)) == {
        INDEX_NAME,
        SAMPLES_NAME,
        *(f"shard-{n:05d}.tar" for n in range(4)),
    }


def test_a_zip_gives_the_same_bytes_as_its_folder(
    built_set: ShardSet, zipped_set: ShardSet
) -> None:
    assert hashes(zipped_set.location) == hashes(built_set.location)


def test_the_index_describes_the_images(images: list[LabelledImage], built_set: ShardSet) -> None:
    flat = np.stack([pixels for pixels, _ in images]).reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(built_set.pixel_mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(built_set.pixel_std, flat.std(0), rtol=1e-9)
    assert built_set.image_shape == (3, 16, 16)
    assert built_set.classes == ("ant", "bee", "cow", "dog")
    assert built_set.num_samples == 37
    assert [shard.num_samples for shard in built_set.shards] == [10, 9, 9, 9]
    assert built_set.num_streams == 4


def test_plain_tarfile_reads_every_sample(images: list[LabelledImage], built_set: ShardSet) -> None:
    parts: dict[str, dict[str, bytes]] = {}
    for shard in built_set.shards:
        with tarfile.open(f"{built_set.location}/{shard.name}") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                parts.setdefault(key, {})[suffix] = file.read()
    found = {key: (part["png"], int(part["cls"])) for key, part in parts.items()}
    assert_holds_every_image(found, images)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_reads_every_sample(images: list[LabelledImage], built_set: ShardSet) -> None:
    urls = [f"{built_set.location}/{shard.name}" for shard in built_set.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    found = {s["__key__"]: (s["png"], int(s["cls"])) for s in samples}
    assert len(samples) == len(found)
    assert_holds_every_image(found, images)


def test_the_index_says_where_each_image_lies_and_its_label(
    images: list[LabelledImage], built_set: ShardSet
) -> None:
    numbers = []
    spans = built_set.spans(np.arange(built_set.num_samples))
    for span, label, crc32 in zip(
        spans, built_set.samples["label"], built_set.samples["crc32"], strict=True
    ):
        with Path(built_set.location, span.name).open("rb") as file:
            file.seek(span.start)
            png = file.read(span.length)
        assert zlib.crc32(png) == crc32
        (number,) = (
            i for i, (pixels, _) in enumerate(images) if np.array_equal(decode(png), pixels)
        )
        assert images[number][1] == label
        numbers.append(number)
    assert sorted(numbers) == list(range(len(images)))


def test_the_index_takes_16_bytes_for_a_sample(built_set: ShardSet) -> None:
    assert built_set.samples.nbytes == 16 * built_set.num_samples


@pytest.mark.usefixtures("builds_here")
def test_a_limit_takes_images_evenly_and_progress_counts_them(
    image_folder: Path, tmp_path: Path
) -> None:
    counts: list[int] = []
    spec = SourceSpec("files", str(image_folder))
    limited = build_shards(
        spec, tmp_path / "limited", num_shards=2, limit=8, progress=counts.append
    )
    numbers = set()
    for shard in limited.shards:
        with tarfile.open(f"{limited.location}/{shard.name}") as tar:
            numbers |= {int(name.partition(".")[0]) for name in tar.getnames()}
    bounds = [part * 37 // 8 for part in range(9)]
    for start, end in pairwise(bounds):
        assert len(numbers & set(range(start, end))) == 1
    assert sorted(counts) == [4, 4]


def test_a_sound_set_verifies(own_set: ShardSet) -> None:
    counts: list[int] = []
    assert verify_shards(own_set, counts.append) == []
    assert sum(counts) == own_set.num_samples


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1024])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(remove, "missing"), (truncate, "bytes, expected"), (flip_bit, "sha256 differs")],
)
def test_verification_names_the_damaged_shard(
    own_set: ShardSet, damage: Callable[[Path], None], words: str
) -> None:
    path = Path(own_set.location) / "shard-00002.tar"
    damage(path)
    (problem,) = verify_shards(own_set)
    assert problem.startswith(f"{path}: ")
    assert words in problem


def test_verification_reports_every_damaged_shard(own_set: ShardSet) -> None:
    for shard in own_set.shards:
        flip_bit(Path(own_set.location) / shard.name)
    assert len(verify_shards(own_set)) == 4


def reindex(shard_set: ShardSet, column: str, sample: int, change: int) -> None:
    """Write an index that agrees with itself and not with the tars."""
    samples = shard_set.samples.copy()
    samples[column][sample] += change
    replace(shard_set, samples=samples).save(Path(shard_set.location))


@pytest.mark.parametrize("column", ["block", "num_bytes", "crc32", "label"])
def test_verification_finds_an_index_that_lies(own_set: ShardSet, column: str) -> None:
    reindex(own_set, column, 12, 1)
    (problem,) = verify_shards(ShardSet.load(own_set.location))
    assert "shard-00001.tar: the samples are not those of the index" in problem


@pytest.mark.parametrize("column", ["block", "num_bytes"])
def test_an_index_that_points_past_the_end_is_refused(own_set: ShardSet, column: str) -> None:
    reindex(own_set, column, 12, 1_000_000)
    with pytest.raises(DataError, match="shard-00001.tar ends after byte") as error:
        ShardSet.load(own_set.location)
    one_line(error)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def test_loading_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such shard directory") as error:
        ShardSet.load(tmp_path / "absent")
    assert str(tmp_path / "absent") in one_line(error)


def test_loading_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty") as error:
        ShardSet.load(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_loading_a_set_without_its_index_says_so(own_set: ShardSet) -> None:
    (Path(own_set.location) / INDEX_NAME).unlink()
    with pytest.raises(DataError, match="has no index.json") as error:
        ShardSet.load(Path(own_set.location))
    assert str(Path(own_set.location)) in one_line(error)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": 1, "shards": [',
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{}",
        b'{"format": 1}',
        b'{"format": 2, "shards": []}',
        b'{"format": 2, "shards": [{"name": "shard-00000.tar"}]}',
        b'{"format": 2, "shards": {"name": "shard-00000.tar"}}',
        b'{"format": 2, "shards": 3}',
    ],
)
def test_a_damaged_index_is_named(own_set: ShardSet, content: bytes) -> None:
    (Path(own_set.location) / INDEX_NAME).write_bytes(content)
    with pytest.raises(DataError, match="is damaged") as error:
        ShardSet.load(Path(own_set.location))
    assert str(Path(own_set.location) / INDEX_NAME) in one_line(error)


def test_a_damaged_list_of_samples_is_named(own_set: ShardSet) -> None:
    flip_bit(Path(own_set.location) / SAMPLES_NAME)
    with pytest.raises(DataError, match="samples.npy has another sha256") as error:
        ShardSet.load(own_set.location)
    one_line(error)


@pytest.mark.parametrize("kind", ["file", "folder with a file"])
def test_a_build_overwrites_nothing(image_folder: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "taken"
    kept = out if kind == "file" else out / "precious"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("precious")
    with pytest.raises(ConfigError, match="exists and is not empty") as error:
        build_shards(SourceSpec("files", str(image_folder)), out, num_shards=4)
    assert str(out) in one_line(error)
    assert kept.read_text() == "precious"


@pytest.mark.parametrize(("num_shards", "limit"), [(38, None), (0, None), (4, 3), (1, 0)])
def test_more_shards_than_images_are_refused(
    image_folder: Path, tmp_path: Path, num_shards: int, limit: int | None
) -> None:
    spec = SourceSpec("files", str(image_folder))
    with pytest.raises(ConfigError, match=r"--num-shards must be|--limit must be") as error:
        build_shards(spec, tmp_path / "set", num_shards=num_shards, limit=limit)
    one_line(error)
    assert not (tmp_path / "set").exists()


def write_png(path: Path, width: int, height: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height)).save(path)


@pytest.mark.parametrize("num_shards", [1, 2])
def test_images_of_different_sizes_are_refused(tmp_path: Path, num_shards: int) -> None:
    write_png(tmp_path / "in/a/0.png", 16, 16)
    write_png(tmp_path / "in/a/1.png", 32, 32)
    with pytest.raises(DataError, match="others have") as error:
        build_shards(
            SourceSpec("files", str(tmp_path / "in")),
            tmp_path / "set",
            num_shards=num_shards,
        )
    one_line(error)
    assert not (tmp_path / "set").exists()


@pytest.mark.usefixtures("builds_here")
@pytest.mark.parametrize(
    ("width", "height", "mode", "words"),
    [(16, 32, "RGB", "16x32"), (24, 24, "RGB", "power of two"), (16, 16, "LA", "mode LA")],
)
def test_images_that_no_model_takes_are_refused(
    tmp_path: Path, width: int, height: int, mode: str, words: str
) -> None:
    write_png(tmp_path / "in/a/0.png", width, height, mode)
    with pytest.raises(DataError, match=words) as error:
        build_shards(SourceSpec("files", str(tmp_path / "in")), tmp_path / "set", num_shards=1)
    one_line(error)


@pytest.mark.usefixtures("builds_here")
def test_a_source_image_that_does_not_decode_is_named(tmp_path: Path) -> None:
    write_png(tmp_path / "in/a/0.png", 16, 16)
    broken = (tmp_path / "in/a/0.png").read_bytes()[:50]
    (tmp_path / "in/a/1.png").write_bytes(broken)
    with pytest.raises(DataError, match="in/a/1.png cannot be decoded") as error:
        build_shards(SourceSpec("files", str(tmp_path / "in")), tmp_path / "set", num_shards=1)
    one_line(error)


@pytest.mark.parametrize("name", ["absent", "empty", "broken.zip", "images.rar"])
def test_a_source_that_holds_no_images_is_an_error_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    (tmp_path / "images.rar").write_bytes(b"no zip")
    with pytest.raises((DataError, ConfigError), match=re.escape(name)) as error:
        open_source(resolve_source(str(tmp_path / name), "train", download_dir=tmp_path)[0])
    one_line(error)


def test_classes_are_counted_where_there_are_labels(built_set: ShardSet) -> None:
    assert built_set.class_counts == (11, 9, 10, 7)
    samples = built_set.samples.copy()
    samples["label"] = -1
    assert replace(built_set, samples=samples).class_counts == ()
