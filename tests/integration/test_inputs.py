"""Images as people have them, through the real command: the right set, or one line that helps.

Each row of the tables is something that somebody had trouble with: how it is made, what is added to
the command, and what must come out. No set appears where the command fails.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ganscale.data.reader import ShardImages
from ganscale.data.shards import ShardSet
from tests.conftest import Verb

pytestmark = pytest.mark.usefixtures("builds_here")

CLASSES = ("ant", "bee", "cow", "dog")
Files = dict[str, bytes]


def picture(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(number: int) -> bytes:
    return encoded(picture(number))


def in_classes(count: int = 20, prefix: str = "", suffix: str = "png") -> Files:
    """Classes take turns."""
    return {f"{prefix}{CLASSES[n % 4]}/{n:04d}.{suffix}": png(n) for n in range(count)}


def deep(is_deep: Callable[[str], bool]) -> Files:
    return {
        (name.replace("/", f"/part{n % 2}/") if is_deep(name) else name): data
        for n, (name, data) in enumerate(in_classes().items())
    }


def mac_files() -> Files:
    files = in_classes()
    for name in list(files):
        folder, _, base = name.partition("/")
        files |= {f"{folder}/._{base}": b"\0\5\x16\7", f"{folder}/.DS_Store": b"x"}
    return files | {"README.txt": b"notes", "ant/Thumbs.db": b"x"}


def transparent(colour: tuple[int, int, int]) -> bytes:
    """Invisible pixels of a loud colour in the upper half."""
    pixels = np.full((16, 16, 4), 255, np.uint8)
    pixels[:8] = (*colour, 0)
    return encoded(Image.fromarray(pixels))


def sixteen_bits(number: int) -> bytes:
    return encoded(Image.fromarray(np.full((16, 16), 257 * number, np.uint16)))


def lying_photo() -> bytes:
    """Red above blue when it is seen upright; stored as the camera lay."""
    upright = np.zeros((96, 64, 3), np.uint8)
    upright[:48], upright[48:] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(np.rot90(upright).copy()), "JPEG", exif=exif, quality=95)


def huge_claim() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def dataset_json(labels: Any) -> Files:
    files = {f"{n // 10:05d}/img{n:08d}.png": png(n) for n in range(20)}
    return files | {"dataset.json": json.dumps({"labels": labels}).encode()}


STYLEGAN_LABELS = [[f"{n // 10:05d}/img{n:08d}.png", n % 4] for n in range(20)]


def sample_files(
    count: int = 12, label: Callable[[int], bytes | None] = lambda n: b"%d" % (n % 4)
) -> Files:
    files = {}
    for n in range(count):
        files[f"{n:06d}.png"] = png(n)
        text = label(n)
        if text is not None:
            files[f"{n:06d}.cls"] = text
    return files


def folder(place: Path, files: Files) -> Path:
    for name, data in files.items():
        path = os.fsencode(place / os.path.dirname(name))
        os.makedirs(path, exist_ok=True)
        (place / name).write_bytes(data)
    return place


def zipped(place: Path, files: Files) -> Path:
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "set.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return place / "set.zip"


def tarred(place: Path, files: Files, name: str = "a.tar") -> Path:
    place.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place / name, "w:gz" if name.endswith("gz") else "w") as tar:
        for member, data in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return place


def linked(place: Path) -> Path:
    """Class folders that are links, and links to nothing, to themselves and to the folder above."""
    store = folder(place.parent / "store", in_classes())
    place.mkdir()
    for inner in store.iterdir():
        (place / inner.name).symlink_to(inner)
    (store / "ant" / "gone.png").symlink_to(store / "nowhere.png")
    (store / "bee" / "up").symlink_to(store / "bee")
    (store / "ant" / "loop.png").symlink_to("loop.png")
    return place


def with_empty_class(place: Path) -> Path:
    (folder(place, in_classes()) / "elk").mkdir()
    return place


def encrypted(place: Path) -> Path:
    path = zipped(place, in_classes())
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = 0
        while (at := data.find(mark, at)) >= 0:
            data[at + offset] |= 1
            at += 4
    path.write_bytes(data)
    return path


def upper_zip(place: Path) -> Path:
    return zipped(place, in_classes()).rename(place / "SET.ZIP")


@dataclass(frozen=True)
class Input:
    """What is built, and what must come of it."""

    make: Callable[[Path], Path]
    """Makes it at a path that is not there; returns the source."""
    num_samples: int = 0
    """0: the command fails."""
    num_classes: int = 0
    says: tuple[str, ...] = ()
    """In what is printed; of a failure, in its one line."""
    options: tuple[str, ...] = ()
    pixels: Callable[[np.ndarray[Any, Any]], bool] = field(default=lambda images: True)
    """What holds of all images, (N, C, H, W)."""


def built(files: Mapping[str, bytes], *rest: Any, **more: Any) -> Input:
    return Input(lambda place: folder(place, dict(files)), *rest, **more)


def of_zip(files: Mapping[str, bytes], *rest: Any, **more: Any) -> Input:
    return Input(lambda place: zipped(place, dict(files)), *rest, **more)


def is_white_above(images: np.ndarray[Any, Any]) -> bool:
    return bool((images[:, :, :8] == 255).all())


def is_red_above_blue(images: np.ndarray[Any, Any]) -> bool:
    above, below = images[:, :, :14].astype(int), images[:, :, 18:].astype(int)
    return bool((above[:, 0] > 240).all() and (below[:, 2] > 240).all())


FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "jfif": "JPEG",
    "gif": "GIF",
    "tif": "TIFF",
    "webp": "WEBP",
    "bmp": "BMP",
}
MIXED = {
    f"all/{n}.{end}": encoded(picture(n), kind) for n, (end, kind) in enumerate(FORMATS.items())
}
RGBA = {f"ant/{n}.png": transparent((255, 0, 255)) for n in range(8)}
SPLITS = in_classes(12, "train/") | {
    name: data for name, data in in_classes(12, "test/").items() if "bee" not in name
}
VEHICLES = {f"{('bus', 'car', 'train')[n % 3]}/{n}.png": png(n) for n in range(30)}
ONE_OF_MANY = "--layout top-folders"

FOLDERS: dict[str, Input] = {
    "RGBA alone": built(RGBA, 8, 1),
    "RGBA to RGB": built(
        RGBA, 8, 1, ("composited on white: 8",), ("--img-channels", "3"), is_white_above
    ),
    "one RGBA": built(
        in_classes() | {"cow/a.png": RGBA["ant/0.png"]}, says=("cow/a.png", "--img-channels")
    ),
    "gray with alpha": built(
        in_classes() | {"cow/la.png": encoded(picture(0).convert("LA"))},
        says=("cow/la.png", "--img-channels"),
    ),
    "16-bit gray": built(
        {f"ant/{n}.png": sixteen_bits(n) for n in range(9)},
        9,
        1,
        ("16 bits a pixel became 8: 9",),
        pixels=lambda images: sorted(images[:, 0, 0, 0].tolist()) == list(range(9)),
    ),
    "EXIF orientation": built(
        {f"photos/{n}.JPG": lying_photo() for n in range(8)},
        8,
        1,
        ("turned as EXIF says: 8",),
        ("--resolution", "32"),
        is_red_above_blue,
    ),
    "CMYK": built(
        in_classes() | {"dog/print.jpg": encoded(picture(1).convert("CMYK"), "JPEG")},
        21,
        4,
        ("mode CMYK became RGB: 1", "dog/print.jpg"),
    ),
    "moving images": built(
        in_classes()
        | {"dog/m.png": encoded(picture(0), save_all=True, append_images=[picture(1)])},
        21,
        4,
        ("later frames of moving images were left out: 1", "dog/m.png"),
    ),
    "palette": built(
        in_classes() | {"dog/p.png": encoded(picture(1).quantize(16))},
        21,
        4,
        ("mode P became RGB: 1",),
    ),
    "odd names": built(
        {f"{CLASSES[n % 4]} größe 猫/image ({n}) [x] 100% é🙂.PNG": png(n) for n in range(12)}
        | {os.fsdecode(b"zzz/\xff\xfe.png"): png(20)},
        13,
        5,
    ),
    "a Mac's files": built(
        mac_files(),
        20,
        4,
        ("hidden or system files: 25, such as", "files that are not images: 1, such as README.txt"),
    ),
    "some deeper": built(
        deep(lambda name: name.startswith("cow")),
        says=(
            "deeper than CLASS/NAME (cow/part0/",
            f"{ONE_OF_MANY}: 4 classes",
            "leaf-folders: 4 classes (ant, bee, cow/part0",
            "flat: all 20 images",
        ),
    ),
    "some deeper, chosen": built(
        deep(lambda name: name.startswith("cow")), 20, 4, options=("--layout", "top-folders")
    ),
    "all deeper": built(
        deep(lambda name: True), says=(f"{ONE_OF_MANY}: 4 classes", "leaf-folders")
    ),
    "all deeper, leaves": built(
        deep(lambda name: True), 20, 4, options=("--layout", "leaf-folders")
    ),
    "all deeper, no classes": built(deep(lambda name: True), 20, 0, options=("--layout", "flat")),
    "an empty class": Input(with_empty_class, 20, 4, ("folders without images: 1, such as elk",)),
    "many formats": built(MIXED, 7, 1),
    "formats that Pillow cannot read": built(
        in_classes() | {f"ant/{n}.heic": b"x" for n in range(9)},
        says=("9 images beside 20 others would be left out", ".heic", "Convert them"),
    ),
    "not square": built(
        {f"ant/{n}.png": encoded(picture(n).resize((100, 40))) for n in range(8)},
        says=("ant/", "is 100x40", "--resolution"),
    ),
    "a file cut off": built(
        in_classes() | {"dog/holiday-2019.png": png(9)[:300]}, says=("dog/holiday-2019.png",)
    ),
    "an empty file": built(in_classes() | {"dog/e.png": b""}, says=("dog/e.png", "it is empty")),
    "an error page": built(
        in_classes() | {"dog/p.jpg": b"<!DOCTYPE html>404"}, says=("dog/p.jpg is not an image",)
    ),
    "a huge claim": built(
        in_classes() | {"cow/b.png": huge_claim()}, says=("cow/b.png is too large",)
    ),
    "twelve images": built({f"only/{n}.png": png(n) for n in range(12)}, 12, 1),
    "one image": built({"only/0.png": png(0)}, 1, 1),
    "links": Input(
        linked,
        20,
        4,
        (
            "links to nothing: 1, such as ant/gone.png",
            "links that lead to themselves: 1, such as ant/loop.png",
            "links to a folder above them: 1",
        ),
    ),
    "a class called train": built(
        VEHICLES, says=("train may be a class or a part", "one of 3 classes", "takes its 10 images")
    ),
    "a class called train, chosen": built(VEHICLES, 30, 3, options=("--layout", "top-folders")),
    "training part": built(SPLITS, 12, 4, ("images of other splits: 9",)),
    "test part": built(SPLITS, 9, 3, options=("--split", "test")),
    "no such part": built(
        in_classes(8, "train/"), says=("has train, but no test",), options=("--split", "test")
    ),
    "tars beside classes": Input(
        lambda place: tarred(folder(place, in_classes()), sample_files(5), "old.tar"),
        says=("images (20) and archives (1, such as old.tar)", "--layout tars"),
    ),
    "tars beside classes, images": Input(
        lambda place: tarred(folder(place, in_classes()), sample_files(5), "old.tar"),
        20,
        4,
        ("archives: 1",),
        ("--layout", "top-folders"),
    ),
    "tars beside classes, tars": Input(
        lambda place: tarred(folder(place, in_classes()), sample_files(8), "old.tar"),
        8,
        4,
        options=("--layout", "tars"),
    ),
    "notes beside the top folder": built(
        in_classes(20, "photos/") | {"README.txt": b"notes"},
        20,
        4,
        ("not images: 1, such as README.txt",),
    ),
    "a few images beside classes": built(
        in_classes() | {"loose.png": png(50)}, 20, 4, ("images beside the class folders: 1",)
    ),
    "many images beside classes": built(
        in_classes() | {f"{n}.png": png(n) for n in range(9)},
        says=("9 images lie beside class folders", "top-folders: 4 classes", "without 9 images"),
    ),
    "equal stems": built(
        {f"ant/{n // 2}.{('png', 'PNG')[n % 2]}": png(n) for n in range(10)}, 10, 1
    ),
    "one colour": built(
        {f"black/{n}.png": encoded(Image.new("RGB", (16, 16))) for n in range(9)}, 9, 1
    ),
    "a folder of another kind": built({"a/song.mp3": b"x"}, says=("no images found", "mp3 (1)")),
    "StyleGAN's labels for some": built(
        dataset_json(STYLEGAN_LABELS[:15]), says=("5 of 20 samples have no label",)
    ),
    "StyleGAN's labels as vectors": built(
        dataset_json([[name, [0.5]] for name, _ in STYLEGAN_LABELS]), says=("not a class number",)
    ),
    "StyleGAN without labels": built(dataset_json(None), 20, 0),
    "no StyleGAN labels at all": built(
        {"ant/0.png": png(0), "dataset.json": b"[]"}, says=("StyleGAN", "--layout top-folders")
    ),
}
ZIPS: dict[str, Input] = {
    "one top folder": of_zip(
        in_classes(20, "photos/") | {"__MACOSX/photos/ant/._0.png": b"x"},
        20,
        4,
        ("hidden or system files: 1",),
    ),
    "a flat top folder": of_zip({f"photos/{n}.png": png(n) for n in range(12)}, 12, 1),
    "training and test part": of_zip(SPLITS, 9, 3, options=("--split", "test")),
    "StyleGAN's labels": of_zip(
        dataset_json(STYLEGAN_LABELS),
        20,
        4,
    ),
    "encrypted": Input(encrypted, says=("encrypted", "set.zip: ")),
    "upper case": Input(upper_zip, 20, 4),
    "backslashes": of_zip(
        {name.replace("/", "\\"): data for name, data in in_classes().items()}, 20, 4
    ),
}


def of_tar(files: Files, *rest: Any, **more: Any) -> Input:
    return Input(lambda place: tarred(place, files), *rest, **more)


UNSORTED = dict(sorted(sample_files().items(), key=lambda item: item[0].endswith("cls")))
TARS: dict[str, Input] = {
    "plain": of_tar(sample_files(), 12, 4),
    "dots in names": of_tar(
        {f"shot 2.0_{name}": data for name, data in sample_files().items()},
        says=("a key ends at the first dot", "..."),
    ),
    "all labels after all images": of_tar(UNSORTED, says=("000000.cls", "tar --sort=name")),
    "a Mac's": of_tar(
        {
            f"./{prefix}{name}": data
            for name, data in sample_files().items()
            for prefix in ("._", "")
        },
        12,
        4,
        ("hidden or system files: 24",),
    ),
    "names that begin with ./": of_tar({f"./{n}": d for n, d in sample_files().items()}, 12, 4),
    "labels of some": of_tar(
        sample_files(label=lambda n: None if n % 3 == 0 else b"1"),
        says=("4 of 12 samples have no label, such as a.tar: 000000",),
    ),
    "a time stamp as label": of_tar(
        sample_files(label=lambda n: b"1732600000" if n == 7 else b"1"),
        says=("1 of 12 samples have a label of 1000 or more", "1732600000 of a.tar: 000007"),
    ),
    "negative labels": of_tar(sample_files(label=lambda n: b"-1"), says=("000000.cls is b'-1'",)),
    "words as labels": of_tar(sample_files(label=lambda n: b"cat"), says=("000000.cls is b'cat'",)),
    "captions": of_tar(
        {
            f"{n:09d}.{end}": png(n) if end == "jpg" else b"{}"
            for n in range(8)
            for end in ("jpg", "json", "txt")
        },
        8,
        0,
        ("fields .json of samples: 8", "fields .txt of samples: 8"),
    ),
    "compressed": Input(
        lambda place: tarred(place, sample_files(), "a.tar.gz"), says=("a.tar.gz", "gunzip")
    ),
    "the same keys twice": Input(
        lambda place: tarred(tarred(place, sample_files()), sample_files(), "b.tar"), 24, 4
    ),
    "class names": of_tar(
        sample_files(), 12, 4, ("ant, bee, cow, dog",), ("--class-names", ",".join(CLASSES))
    ),
    "too few class names": of_tar(
        sample_files(), says=("2 names, the set has 4",), options=("--class-names", "a,b")
    ),
}


def check(case: Input, place: Path, code: int, out: str, err: str) -> None:
    lines = [line for line in err.splitlines() if line]
    if not case.num_samples:
        assert code in (1, 2), err
        assert lines[-1].startswith("ganscale: ")
        assert "Traceback" not in err
        assert not (place / "index.json").exists()
        said = lines[-1]
    else:
        assert code == 0, err
        said = out + err
        shard_set = ShardSet.load(place)
        assert shard_set.num_samples == case.num_samples
        assert len(shard_set.classes) == case.num_classes
        images = ShardImages(shard_set).read(np.arange(shard_set.num_samples))
        assert not images.damaged
        assert case.pixels(images.pixels.numpy())
    for words in case.says:
        assert words in said


@pytest.mark.parametrize("case", [*FOLDERS.values(), *ZIPS.values()], ids=[*FOLDERS, *ZIPS])
def test_a_folder_or_zip(case: Input, verb: Verb, tmp_path: Path) -> None:
    source, out = case.make(tmp_path / "in"), tmp_path / "set"
    ends = verb("shards", "build", "--source", source, "--out", out, *case.options)
    check(case, out, *ends)


@pytest.mark.parametrize("case", TARS.values(), ids=TARS)
def test_webdataset_tars_where_they_are(case: Input, verb: Verb, tmp_path: Path) -> None:
    source = case.make(tmp_path / "in")
    check(case, source, *verb("shards", "index", source, *case.options))
