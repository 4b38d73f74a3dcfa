"""Images are the same wherever they lie; an archive writes nothing where it should not."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from ganscale.data.resolve_source import CIFAR10_ENV, CIFAR100_ENV, resolve_source
from ganscale.data.sources import Source, open_source
from ganscale.errors import ConfigError, DataError

Sample = tuple[bytes, int]


def opened(path: Path, scratch: Path, split: Any = "train") -> Source:
    spec, notice = resolve_source(str(path), split, download_dir=scratch)
    assert notice is None
    return open_source(spec)


def samples(source: Source) -> list[Sample]:
    return [(source.read(index), source.label(index)) for index in range(len(source))]


def pixels(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def write_images(folder: Path, names: list[str], seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image.save(folder / name)
    return folder


def tarred(folder: Path, path: Path, mode: Any = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for file in sorted(folder.rglob("*"), reverse=True):
            tar.add(file, file.relative_to(folder).as_posix(), recursive=False)
    return path


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def packed(folder: Path, path: Path) -> Path:
    """The folder itself, or an archive of it, as the suffix of `path` says."""
    if path.suffix == ".zip":
        return zipped(folder, path)
    if path.suffix == "":
        shutil.copytree(folder, path)
        return path
    return tarred(folder, path, "w" if path.suffix == ".tar" else "w:gz")


def listing(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def refusal(path: Path, scratch: Path, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as error:
        samples(opened(path, scratch))
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


CLASSIFIED = ["bee/2.png", "ant/1.jpg", "ant/10.png", "bee/0.PNG", "cow/3.webp", "ant/2.bmp"]
PACKINGS = ["images", "images.zip", "images.tar", "images.tar.gz", "images.tgz"]


@pytest.mark.parametrize("packing", PACKINGS)
def test_class_folders_give_the_same_samples_however_they_are_packed(
    packing: str, tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "in", CLASSIFIED)
    (folder / "ant" / "notes.txt").write_text("no image")
    (folder / "README.md").write_text("no image")
    (folder / "empty").mkdir()
    source = opened(packed(folder, tmp_path / packing), tmp_path / "scratch")
    in_order = ["ant/1.jpg", "ant/10.png", "ant/2.bmp", "bee/0.PNG", "bee/2.png", "cow/3.webp"]
    labels = [0, 0, 0, 1, 1, 2]
    expected = [
        ((folder / name).read_bytes(), label) for name, label in zip(in_order, labels, strict=True)
    ]
    assert list(source.classes) == ["ant", "bee", "cow"]
    assert samples(source) == expected


@pytest.mark.parametrize("packing", PACKINGS)
def test_images_without_class_folders_have_no_labels(packing: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", ["b.png", "a.png", "c.jpg"])
    source = opened(packed(folder, tmp_path / packing), tmp_path / "scratch")
    names = ["a.png", "b.png", "c.jpg"]
    expected = [((folder / name).read_bytes(), -1) for name in names]
    assert list(source.classes) == []
    assert samples(source) == expected


@pytest.mark.parametrize("packing", PACKINGS)
def test_hidden_files_beside_images_are_no_images(packing: str, tmp_path: Path) -> None:
    """macOS leaves `._name.png` beside each `name.png` that it copies or packs."""
    folder = write_images(tmp_path / "in", ["ant/1.png"])
    (folder / "ant" / "._1.png").write_bytes(b"\0\x05\x16\x07Mac OS X")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "1.png").write_bytes(b"\0\x05\x16\x07Mac OS X")
    source = opened(packed(folder, tmp_path / packing), tmp_path / "scratch")
    assert list(source.classes) == ["ant"]
    assert [data for data, _ in samples(source)] == [(folder / "ant/1.png").read_bytes()]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("packing", ["images", "images.tar.gz"])
@pytest.mark.parametrize("inner_zips", [False, True])
def test_a_folder_with_train_and_test_inside_gives_the_split(
    split: str, packing: str, inner_zips: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    for seed, inside in enumerate(("train", "test")):
        write_images(tmp_path / "all" / inside, ["ant/0.png", "bee/0.png"], seed)
        folder.mkdir(exist_ok=True)
        packed(tmp_path / "all" / inside, folder / (f"{inside}.zip" if inner_zips else inside))
    source = opened(packed(folder, tmp_path / packing), tmp_path / "scratch", split)
    files = [tmp_path / "all" / split / name for name in ("ant/0.png", "bee/0.png")]
    assert [data for data, _ in samples(source)] == [file.read_bytes() for file in files]
    assert list(source.classes) == ["ant", "bee"]


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 of three images a batch, with torchvision's checksums changed to its own."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(name: str) -> list[str]:
        images = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
        return [name, write(name, {"data": images, "labels": rng.integers(0, 10, 3).tolist()})]

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{n}") for n in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    names = ["airplane", "automobile", "bird", "cat", "deer"]
    names += ["dog", "frog", "horse", "ship", "truck"]
    meta = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta}
    )
    return folder


def as_published(cifar: Path, tmp_path: Path) -> Path:
    return tarred(cifar.parent, tmp_path / "cifar-10-python.tar.gz")


CIFAR_PLACES: dict[str, Callable[[Path, Path], Path]] = {
    "the folder": lambda cifar, tmp_path: cifar,
    "its parent": lambda cifar, tmp_path: cifar.parent,
    "the archive": as_published,
}


@pytest.mark.parametrize("place", CIFAR_PLACES.values(), ids=CIFAR_PLACES.keys())
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("by_environment", [False, True])
def test_cifar10_is_found_as_published(
    cifar: Path,
    place: Callable[[Path, Path], Path],
    split: Any,
    by_environment: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = place(cifar, tmp_path)
    if by_environment:
        monkeypatch.setenv(CIFAR10_ENV, str(path))
        spec, notice = resolve_source("cifar10", split, download_dir=tmp_path / "scratch")
        assert notice is None
        source = open_source(spec)
    else:
        source = opened(path, tmp_path / "scratch", split)
    batches = [f"data_batch_{n}" for n in range(1, 6)] if split == "train" else ["test_batch"]
    contents = [pickle.loads((cifar / name).read_bytes()) for name in batches]
    planes = np.concatenate([content["data"] for content in contents]).reshape(-1, 3, 32, 32)
    labels = [label for content in contents for label in content["labels"]]
    found = samples(source)
    assert [label for _, label in found] == labels
    for (data, _), expected in zip(found, planes, strict=True):
        assert np.array_equal(pixels(data).transpose(2, 0, 1), expected)
    assert list(source.classes)[:3] == ["airplane", "automobile", "bird"]


@pytest.mark.parametrize("place", ["", "cifar-100-python"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("by_name", [False, True])
def test_cifar100_is_read_as_published(
    place: str, split: Any, by_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pickles have fine and coarse labels, and names of the fine classes in `meta`."""
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    contents: dict[str, dict[str, Any]] = {
        name: {
            "data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
            "fine_labels": labels,
            "coarse_labels": [0] * 4,
        }
        for name, labels in (("train", [7, 0, 99, 7]), ("test", [1, 2, 3, 4]))
    }
    files = {name: write(name, content) for name, content in contents.items()}
    names = [f"class {n}" for n in range(100)]
    meta = write("meta", {"fine_label_names": names})[1]
    monkeypatch.setattr(CIFAR100, "train_list", [files["train"]])
    monkeypatch.setattr(CIFAR100, "test_list", [files["test"]])
    monkeypatch.setattr(
        CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": meta}
    )
    if by_name:
        monkeypatch.setenv(CIFAR100_ENV, str(tmp_path / "data" / place))
        source = open_source(resolve_source("cifar100", split, download_dir=tmp_path)[0])
    else:
        source = opened(tmp_path / "data" / place, tmp_path / "scratch", split)
    content = contents[split]
    assert list(source.classes) == names
    assert [source.label(n) for n in range(4)] == content["fine_labels"]
    planes = content["data"].reshape(4, 3, 32, 32)
    for index, expected in enumerate(planes):
        assert np.array_equal(pixels(source.read(index)).transpose(2, 0, 1), expected)


def test_a_damaged_cifar10_is_refused(cifar: Path, tmp_path: Path) -> None:
    with (cifar / "data_batch_3").open("r+b") as file:
        file.seek(500)
        file.write(b"damage")
    refusal(cifar, tmp_path / "scratch")


def test_a_folder_of_webdataset_tars_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", [f"{n}.png" for n in range(5)])
    (tmp_path / "tars").mkdir()
    contents = [(images / f"{n}.png").read_bytes() for n in range(5)]
    for name, numbers in (("b.tar", [3, 4]), ("a.tar", [0, 1, 2])):
        with wds.TarWriter(str(tmp_path / "tars" / name), encoder=False) as writer:
            for n in numbers:
                writer.write({"__key__": f"k{n}", "png": contents[n], "cls": str(n * 2).encode()})
    source = opened(tmp_path / "tars", tmp_path / "scratch")
    assert samples(source) == [(contents[n], n * 2) for n in range(5)]
    assert list(source.classes) == [str(n) for n in range(9)]


def test_tars_are_scanned_by_their_headers_and_once_for_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tars").mkdir()
    contents = [os.urandom(1000 + n) for n in range(4)]
    for n, data in enumerate(contents):
        with wds.TarWriter(str(tmp_path / "tars" / f"{n // 2}-{n}.tar"), encoder=False) as writer:
            writer.write({"__key__": f"k{n}", "png": data, "cls": str(n).encode()})
    source = opened(tmp_path / "tars", tmp_path / "scratch")
    read: list[int] = []
    pread = os.pread

    def counting(descriptor: int, num_bytes: int, offset: int) -> bytes:
        read.append(num_bytes)
        return pread(descriptor, num_bytes, offset)

    monkeypatch.setattr("ganscale.data.tars.os.pread", counting)
    assert len(source) == 4
    assert read == [1] * 4, "labels are read and no image"
    part = source.part([3, 1])
    assert part is not None
    # Elsewhere the tars are read at the places that are known.
    monkeypatch.setattr("ganscale.data.sources.scan_tar", None)
    sent = pickle.loads(pickle.dumps(part))
    assert [(sent.read(n), sent.label(n), sent.name(n)) for n in (1, 3)] == [
        (contents[n], n, f"{tmp_path / 'tars'}/{n // 2}-{n}.tar: k{n}") for n in (1, 3)
    ]


def test_a_damaged_webdataset_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    path = tmp_path / "tars" / "a.tar"
    with wds.TarWriter(str(path), encoder=False) as writer:
        writer.write({"__key__": "0", "png": b"pixels"})
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(DataError) as error:
        samples(opened(tmp_path / "tars", tmp_path / "scratch"))
    assert str(path) in str(error.value)


def hostile_tar(path: Path, name: str, **changes: Any) -> Path:
    """An archive with one good image and one entry that reaches out."""
    with tarfile.open(path, "w:gz") as tar:
        good = tarfile.TarInfo("ant/0.png")
        good.size = 6
        tar.addfile(good, io.BytesIO(b"pixels"))
        bad = tarfile.TarInfo(name)
        for attribute, value in changes.items():
            setattr(bad, attribute, value)
        tar.addfile(bad, io.BytesIO(b"hostile") if changes.get("size") else None)
    return path


HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("../../x.png", {"size": 7}),
    ("ant/../../../x.png", {"size": 7}),
    ("ant/1.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/hostname"}),
    ("ant/1.png", {"type": tarfile.SYMTYPE, "linkname": "../../../victim"}),
    ("ant/1.png", {"type": tarfile.LNKTYPE, "linkname": "../../victim"}),
    ("ant/1.png", {"type": tarfile.FIFOTYPE}),
    ("ant/1.png", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
]


@pytest.mark.parametrize(("name", "changes"), HOSTILE)
def test_an_archive_that_reaches_out_is_refused_and_writes_nothing(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "victim").write_text("untouched")
    path = hostile_tar(tmp_path / "images.tar.gz", name, **changes)
    (tmp_path / "scratch").mkdir()
    before = listing(tmp_path)
    assert "cannot be unpacked" in refusal(path, tmp_path / "scratch")
    assert listing(tmp_path) == before
    assert (tmp_path / "victim").read_text() == "untouched"


def test_an_absolute_name_stays_inside(tmp_path: Path) -> None:
    target = tmp_path / "outside" / "x.png"
    path = hostile_tar(tmp_path / "images.tar.gz", str(target), size=7)
    with suppress(DataError):
        opened(path, tmp_path / "scratch")
    assert not target.parent.exists()


def test_a_link_that_is_followed_by_a_file_through_it_writes_nothing_outside(
    tmp_path: Path,
) -> None:
    (tmp_path / "outside").mkdir()
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("ant")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside")
        tar.addfile(link)
        file = tarfile.TarInfo("ant/0.png")
        file.size = 6
        tar.addfile(file, io.BytesIO(b"pixels"))
    refusal(path, tmp_path / "scratch")
    assert listing(tmp_path / "outside") == []


@pytest.mark.parametrize("name", ["../../x.png", "../x.png", "/x.png", "ant/../../x.png"])
def test_a_zip_with_names_that_reach_out_writes_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ant/0.png", b"pixels")
        archive.writestr(name, b"hostile")
    before = listing(tmp_path)
    source = opened(path, tmp_path / "scratch")
    assert [data for data, _ in samples(source) if data != b"hostile"] == [b"pixels"]
    assert list(source.classes) == ["ant"]
    assert source.left_out
    assert [item for item in listing(tmp_path) if item != "scratch"] == before


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "HTML": lambda data: b"<!DOCTYPE html><title>404</title>" * 100,
}


@pytest.mark.parametrize("packing", ["images.zip", "images.tar", "images.tar.gz", "images.tgz"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_archive_is_refused_and_leaves_nothing(
    packing: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "in", [f"ant/{n}.png" for n in range(20)])
    path = packed(folder, tmp_path / packing)
    path.write_bytes(damage(path.read_bytes()))
    refusal(path, tmp_path / "scratch")
    if (tmp_path / "scratch").exists():
        assert listing(tmp_path / "scratch") == []


def test_a_flipped_bit_in_a_zipped_image_is_found(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", ["ant/0.png"])
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.write(folder / "ant/0.png", "ant/0.png")
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 50] ^= 1
    path.write_bytes(data)
    assert "ant/0.png is damaged" in refusal(path, tmp_path / "scratch")


def test_a_flipped_bit_in_a_gzipped_image_is_found(tmp_path: Path) -> None:
    """gzip's checksum is at the end of the file, behind the end of the tar."""
    folder = write_images(tmp_path / "in", ["ant/0.bmp", "ant/1.bmp"])
    tar = tarred(folder, tmp_path / "plain", "w").read_bytes()
    whole = gzip.compress(tar, compresslevel=0) + gzip.compress(bytes(2**20))
    damaged = bytearray(whole)
    damaged[whole.index((folder / "ant/0.bmp").read_bytes()) + 100] ^= 1
    (tmp_path / "whole.tar.gz").write_bytes(whole)
    (tmp_path / "damaged.tar.gz").write_bytes(damaged)
    assert len(samples(opened(tmp_path / "whole.tar.gz", tmp_path / "scratch"))) == 2
    refusal(tmp_path / "damaged.tar.gz", tmp_path / "scratch")


@pytest.mark.parametrize("at", [1024, 5 * 1024, 10 * 1024, 20 * 1024])
@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz"])
def test_a_tar_cut_between_members_is_refused(at: int, name: str, tmp_path: Path) -> None:
    """tarfile takes it for the end of the archive, and half the images would be missing."""
    folder = write_images(tmp_path / "in", [f"{n:02d}.png" for n in range(20)])
    assert max(file.stat().st_size for file in folder.iterdir()) <= 512
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    data = buffer.getvalue()[:at]
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    refusal(tmp_path / name, tmp_path / "scratch")


def test_a_zip_that_needs_a_password_is_refused(tmp_path: Path) -> None:
    path = zipped(write_images(tmp_path / "in", ["ant/0.png"]), tmp_path / "images.zip")
    data = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for at in [i for i in range(len(data)) if data.startswith(mark, i)]:
            data[at + flags] |= 1
    path.write_bytes(data)
    refusal(path, tmp_path / "scratch")


def test_an_archive_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images(tmp_path / "in", CLASSIFIED)
    path = tarred(folder, tmp_path / "images.tar.gz")
    first = samples(opened(path, tmp_path / "scratch"))
    states = {p: p.stat().st_ino for p in (tmp_path / "scratch").rglob("*")}

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("unpacked again")

    monkeypatch.setattr(tarfile.TarFile, "extractall", unexpected)
    assert samples(opened(path, tmp_path / "scratch")) == first
    assert {p: p.stat().st_ino for p in (tmp_path / "scratch").rglob("*")} == states


def test_a_changed_archive_is_unpacked_anew(tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    for seed in (0, 1):
        folder = write_images(tmp_path / f"in{seed}", ["ant/0.png"], seed)
        tarred(folder, path, "w")
        os.utime(path, ns=(seed, seed))
        (sample,) = samples(opened(path, tmp_path / "scratch"))
        assert sample[0] == (folder / "ant/0.png").read_bytes()


def test_archives_of_one_name_size_and_time_are_told_apart(tmp_path: Path) -> None:
    """Reproducible archives all carry one time, and tars come in multiples of 10 KiB."""
    for seed in (0, 1):
        folder = write_images(tmp_path / f"in{seed}", ["ant/0.png"], seed)
        place = tmp_path / f"place{seed}"
        place.mkdir()
        path = tarred(folder, place / "images.tar", "w")
        os.utime(path, ns=(0, 0))
        (sample,) = samples(opened(path, tmp_path / "scratch"))
        assert sample[0] == (folder / "ant/0.png").read_bytes()


class Killed(BaseException):
    """Stands for whatever ends a process in the middle."""


def test_an_interrupted_unpacking_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "in", [f"ant/{n}.png" for n in range(9)])
    path = tarred(folder, tmp_path / "images.tar.gz")
    extract = tarfile.TarFile._extract_one  # type: ignore[attr-defined]
    extracted: list[object] = []

    def killed_in_the_middle(self: tarfile.TarFile, *args: Any, **kwargs: Any) -> None:
        if len(extracted) == 4:
            raise Killed
        extracted.append(args)
        extract(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "_extract_one", killed_in_the_middle)
        # What a SIGKILL leaves, which runs no clean-up: the temporary folder.
        patch.setattr("tempfile.TemporaryDirectory.cleanup", lambda self: None)
        patch.setattr("weakref.finalize.__call__", lambda self, _=None: None)
        with pytest.raises(Killed):
            opened(path, tmp_path / "scratch")
    assert len(extracted) == 4
    assert not [p for p in (tmp_path / "scratch").iterdir() if not p.name.startswith(".")]
    assert len(samples(opened(path, tmp_path / "scratch"))) == 9


def test_a_failed_unpacking_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tarred(write_images(tmp_path / "in", ["ant/0.png"]), tmp_path / "images.tar")

    def full(self: object, folder: str, **_: object) -> None:
        Path(folder).mkdir()
        (Path(folder) / "half.png").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    assert "No space left" in refusal(path, tmp_path / "scratch")
    assert listing(tmp_path / "scratch") == []


def test_two_that_unpack_the_same_archive_at_once_both_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tarred(write_images(tmp_path / "in", CLASSIFIED), tmp_path / "images.tar")
    both_are_unpacking = threading.Barrier(2, timeout=600)
    extractall = tarfile.TarFile.extractall

    def together(self: tarfile.TarFile, *args: Any, **kwargs: Any) -> None:
        both_are_unpacking.wait()
        extractall(self, *args, **kwargs)

    monkeypatch.setattr(tarfile.TarFile, "extractall", together)
    errors: list[BaseException] = []
    specs = []

    def resolve() -> None:
        try:
            specs.append(resolve_source(str(path), "train", download_dir=tmp_path / "scratch"))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=resolve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert specs[0] == specs[1]
    assert len(samples(open_source(specs[0][0]))) == len(CLASSIFIED)


@pytest.mark.parametrize("name", ["images.rar", "images.7z", "image.png", "images"])
def test_a_file_of_an_unknown_kind_is_a_wrong_setting(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"whatever")
    message = refusal(tmp_path / name, tmp_path / "scratch", ConfigError)
    assert "expected a folder or archive" in message


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("absent", "absent.zip", "absent/deep.tar.gz"):
        assert "no such image source" in refusal(tmp_path / name, tmp_path / "scratch")


def test_a_folder_without_images_says_what_was_looked_for(tmp_path: Path) -> None:
    for name in ("a/b/notes.txt", "c/d/song.mp3"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(b"no image")
    message = refusal(tmp_path / "in", tmp_path / "scratch")
    assert "mp3 (1)" in message
    assert "webp" in message


def test_a_missing_cifar10_of_the_environment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CIFAR10_ENV, str(tmp_path / "absent"))
    for name in ("cifar10", "auto"):
        with pytest.raises(DataError, match="no such image source"):
            resolve_source(name, "train", download_dir=tmp_path)


@pytest.mark.parametrize("archive", ["images.tar", "images.tar.gz"])
def test_an_archive_of_one_top_folder_is_that_folder(tmp_path: Path, archive: str) -> None:
    write_images(tmp_path / "in/top", CLASSIFIED)
    path = tarred(tmp_path / "in", tmp_path / archive)
    spec, _ = resolve_source(str(path), "train", download_dir=tmp_path / "scratch")
    inner, _ = resolve_source(str(tmp_path / "in/top"), "train", download_dir=tmp_path)
    assert samples(open_source(spec)) == samples(open_source(inner))


def test_the_images_of_one_split_are_never_taken_for_the_other(tmp_path: Path) -> None:
    write_images(tmp_path / "in/train", CLASSIFIED)
    with pytest.raises(DataError, match="has train, but no test"):
        opened(tmp_path / "in", tmp_path, "test")
