"""Every sample of a sound tar is found where it lies; a damaged tar never looks like a shorter one.

The table of damage is what tarfile and webdataset do not notice (or notice late).
"""

from __future__ import annotations

import io
import random
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds

from ganscale.data.tars import BLOCK_BYTES, TarSample, scan_tar
from ganscale.errors import DataError

Damage = Callable[[bytes], bytes]
SIZES = (1, 511, 512, 513, 1200, 700, 90, 1024)
SECOND = "000002.png"


@pytest.fixture(scope="module")
def contents() -> list[tuple[str, bytes, int]]:
    """(key, bytes of the image, label) of eight samples whose sizes are around whole blocks."""
    rng = random.Random(0)
    return [(f"{i:06d}", rng.randbytes(size), i * 37 % 11) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def sound(contents: list[tuple[str, bytes, int]]) -> bytes:
    """The samples as webdataset writes them."""
    buffer = io.BytesIO()
    with wds.TarWriter(buffer, encoder=False) as writer:
        for key, image, label in contents:
            writer.write({"__key__": key, "png": image, "cls": str(label).encode()})
    return buffer.getvalue()


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: member for member in tar}


def scan(path: Path, data: bytes) -> list[TarSample]:
    path.write_bytes(data)
    return list(scan_tar(path))


def refusal(path: Path) -> str:
    """The message with which a tar is refused: one line that names it."""
    with pytest.raises(DataError) as error:
        list(scan_tar(path))
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def entry(name: str, data: bytes = b"", **changes: object) -> bytes:
    """One member as it lies in a tar: header, bytes, padding."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in changes.items():
        setattr(info, attribute, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK_BYTES)


def archive(*entries: bytes) -> bytes:
    return b"".join(entries) + bytes(2 * BLOCK_BYTES)


def test_every_sample_is_found_where_its_bytes_lie(
    sound: bytes, contents: list[tuple[str, bytes, int]], tmp_path: Path
) -> None:
    found = scan(tmp_path / "a.tar", sound)
    by_name = members(sound)
    assert [(s.key, s.label) for s in found] == [(key, label) for key, _, label in contents]
    for sample, (key, image, _) in zip(found, contents, strict=True):
        start = BLOCK_BYTES * sample.block
        assert start == by_name[f"{key}.png"].offset_data
        assert sound[start : start + sample.num_bytes] == image
        assert sample.crc32 == zlib.crc32(image)
        assert sample.row == (sample.block, sample.num_bytes, sample.crc32, sample.label)


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_every_tar_format_and_long_names_are_read(tar_format: int, tmp_path: Path) -> None:
    key = f"{'f' * 90}/{'n' * 60}" if tar_format == tarfile.USTAR_FORMAT else "é" * 120
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
        for suffix, data in (("cls", b"4"), ("png", b"pixels")):
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (sample,) = scan_tar(tmp_path / "a.tar")
    assert (sample.key, sample.label, sample.crc32) == (key, 4, zlib.crc32(b"pixels"))
    start = BLOCK_BYTES * sample.block
    assert (tmp_path / "a.tar").read_bytes()[start:].startswith(b"pixels\0")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.png", "a"),
        ("deep/er/a.png", "deep/er/a"),
        ("v1.2/a.png", "v1.2/a"),
        ("./a.png", "./a"),
    ],
)
def test_keys_are_webdatasets(name: str, key: str, tmp_path: Path) -> None:
    label_name = name.replace(".png", ".cls")
    extra_name = name.replace(".png", ".seg.v2.png")
    data = archive(entry(label_name, b"3"), entry(name, b"pixels"), entry(extra_name, b"mask"))
    (sample,) = scan(tmp_path / "a.tar", data)
    assert (sample.key, sample.label, sample.num_bytes) == (key, 3, 6)
    (other,) = wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    assert (other["__key__"], other["cls"], other["png"]) == (key, b"3", b"pixels")
    assert other["seg.v2.png"] == b"mask"


def test_folders_in_an_archive_are_passed_over(tmp_path: Path) -> None:
    folder = entry("ant", type=tarfile.DIRTYPE)
    (sample,) = scan(tmp_path / "a.tar", archive(folder, entry("ant/0.jpg", b"pixels")))
    assert sample == TarSample("ant/0", 2, 6, zlib.crc32(b"pixels"), -1)


@pytest.mark.parametrize("text", [b"7", b" 7\n", b"07"])
def test_a_label_may_have_space_around_it(text: bytes, tmp_path: Path) -> None:
    (sample,) = scan(tmp_path / "a.tar", archive(entry("a.cls", text), entry("a.png", b"x")))
    assert sample.label == 7


def cut(at: Callable[[bytes], int]) -> Damage:
    return lambda data: data[: at(data)]


def overwrite(at: Callable[[bytes], int], new: bytes) -> Damage:
    def damage(data: bytes) -> bytes:
        start = at(data)
        return data[:start] + new + data[start + len(new) :]

    return damage


def header_of(name: str, after: int = 0) -> Callable[[bytes], int]:
    return lambda data: members(data)[name].offset + after


def content_of(name: str, after: int = 0) -> Callable[[bytes], int]:
    return lambda data: members(data)[name].offset_data + after


def end_of_archive(data: bytes) -> int:
    last = list(members(data).values())[-1]
    return last.offset_data + -(-last.size // BLOCK_BYTES) * BLOCK_BYTES


def flip_one_bit(data: bytes) -> bytes:
    at = header_of(SECOND, 10)(data)
    return overwrite(lambda _: at, bytes([data[at] ^ 1]))(data)


DAMAGE: dict[str, Damage] = {
    "cut inside file bytes": cut(content_of("000004.png", 700)),
    "cut at the end of a block of file bytes": cut(content_of("000004.png", 512)),
    "cut inside padding": cut(content_of("000004.png", 1300)),
    "cut inside the last padding": cut(lambda data: end_of_archive(data) - 1),
    "cut inside a header": cut(header_of("000004.cls", 100)),
    "cut between samples": cut(header_of("000004.cls")),
    "cut between the members of a sample": cut(header_of("000004.png")),
    "header overwritten": overwrite(header_of(SECOND), b"\xaa" * 512),
    "first header overwritten": overwrite(header_of("000000.cls"), b"\xaa" * 512),
    "one bit flipped in a header": flip_one_bit,
    "zeros over a header": overwrite(header_of("000004.png"), bytes(1000)),
    "zeros over a label's header": overwrite(header_of("000004.cls"), bytes(1000)),
    "zeros over one header exactly": overwrite(header_of("000004.cls"), bytes(512)),
    "zeros over the first header": overwrite(header_of("000000.cls"), bytes(1024)),
    "no end-of-archive blocks": cut(end_of_archive),
    "half of the end-of-archive mark": cut(lambda data: end_of_archive(data) + 512),
    "end-of-archive mark cut by a byte": cut(lambda data: end_of_archive(data) + 1023),
    "another archive behind it": lambda data: data + data,
    "a last byte that is not zero": lambda data: data[:-1] + b"\n",
    "empty": lambda data: b"",
    "HTML": lambda data: b"<!DOCTYPE html>\n<title>404 Not Found</title>\n" * 40,
    "a short page of HTML": lambda data: b"<title>404 Not Found</title>",
    "gzip": lambda data: b"\x1f\x8b\x08\x00" + data[4:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_an_error_that_names_the_tar(
    sound: bytes, damage: Damage, tmp_path: Path
) -> None:
    damaged = damage(sound)
    assert damaged != sound
    (tmp_path / "a.tar").write_bytes(damaged)
    refusal(tmp_path / "a.tar")


def test_a_missing_tar_and_a_folder_are_errors_that_name_it(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.tar")
    (tmp_path / "folder.tar").mkdir()
    refusal(tmp_path / "folder.tar")


def scan_or_none(path: Path, data: bytes) -> list[TarSample] | None:
    try:
        return scan(path, data)
    except DataError:
        return None


@pytest.mark.parametrize("name", ["000000.cls", SECOND])
def test_no_flipped_bit_in_a_header_loses_a_sample(sound: bytes, name: str, tmp_path: Path) -> None:
    start = members(sound)[name].offset
    expected = scan(tmp_path / "a.tar", sound)
    survived = []
    for place in range(BLOCK_BYTES):
        damaged = bytearray(sound)
        damaged[start + place] ^= 1 << place % 8
        found = scan_or_none(tmp_path / "a.tar", bytes(damaged))
        assert found in (None, expected), f"bit flipped in byte {place} of the header"
        if found is not None:
            survived.append(place)
    assert set(survived) <= set(range(148, 156)), "only the checksum's own padding may change"


def test_no_cut_and_no_hole_loses_a_sample(sound: bytes, tmp_path: Path) -> None:
    rng = random.Random(1)
    expected = [sample.key for sample in scan(tmp_path / "a.tar", sound)]
    end = end_of_archive(sound)
    for _ in range(150):
        start = rng.randrange(end)
        assert scan_or_none(tmp_path / "a.tar", sound[:start]) is None, f"cut at {start}"
        length = rng.choice([1, 100, 512, 1000, 1024, 3000])
        hole = bytes(min(length, end - start))
        found = scan_or_none(tmp_path / "a.tar", overwrite(lambda _: start, hole)(sound))  # noqa: B023
        keys = expected if found is None else [sample.key for sample in found]
        assert keys == expected, f"{length} zeros at {start}"


@pytest.mark.parametrize("name", ["../../x.png", "a/../../x.png", "/x.png"])
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(archive(entry("a.png", b"1"), entry(name, b"2")))
    message = refusal(tmp_path / "a.tar")
    assert name in message
    assert "leaves the archive's folder" in message


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "is a link"),
        (tarfile.LNKTYPE, "is a link"),
        (tarfile.FIFOTYPE, "not a plain file"),
        (tarfile.CHRTYPE, "not a plain file"),
        (tarfile.BLKTYPE, "not a plain file"),
    ],
)
def test_what_is_no_plain_file_is_refused(kind: bytes, words: str, tmp_path: Path) -> None:
    other = entry("b.png", type=kind, linkname="a.png")
    (tmp_path / "a.tar").write_bytes(archive(entry("a.png", b"1"), other))
    message = refusal(tmp_path / "a.tar")
    assert "b.png" in message
    assert words in message


def test_a_sparse_member_is_refused_or_indexed_with_its_own_bytes(tmp_path: Path) -> None:
    """A GNU sparse member lies in the tar without its holes, so its bytes cannot be sliced out."""
    length = 4096
    info = tarfile.TarInfo("a.png")
    info.size = BLOCK_BYTES
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (length - BLOCK_BYTES, BLOCK_BYTES)
    header[483:495] = b"%011o\0" % length
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data = bytes(header) + b"x" * BLOCK_BYTES + entry("b.png", b"y" * length)
    (tmp_path / "a.tar").write_bytes(archive(data))
    with tarfile.open(tmp_path / "a.tar") as tar:
        file = tar.extractfile("a.png")
        assert file is not None
        logical = file.read()
    assert logical == bytes(length - BLOCK_BYTES) + b"x" * BLOCK_BYTES
    found = scan_or_none(tmp_path / "a.tar", archive(data))
    assert found is None or found[0].crc32 == zlib.crc32(logical)


@pytest.mark.parametrize("size", [-(2**40), -512, -5, 2**40, 2**62, 2**80])
@pytest.mark.timeout(5)
def test_a_size_that_cannot_be_is_refused(size: int, tmp_path: Path) -> None:
    """Python before 3.11.14 goes round for ever on -512 (CVE-2025-8194)."""
    header = bytearray(tarfile.TarInfo("b.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size % 256**12 | (0 if size < 0 else 0x80 << 88)).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(archive(entry("a.png", bytes(2000)), bytes(header)))
    refusal(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([("a.png", b"1"), ("b.cls", b"1")], "sample b needs one image, it has 0"),
        ([("b.txt", b"1"), ("a.png", b"1")], "sample b needs one image, it has 0"),
        ([("b.jpg", b"1"), ("b.png", b"1")], "sample b needs one image, it has 2"),
        ([("b.png", b"1"), ("b.png", b"1")], "sample b needs one image"),
        ([("b.png", b"1"), ("b.PNG", b"1")], "sample b needs one image, it has 2"),
        ([("b.cls", b"1"), ("b.cls", b"2"), ("b.png", b"1")], "sample b needs one image"),
        ([("b.png", b"1"), ("c.png", b"1"), ("b.cls", b"1")], "sample b needs one image"),
        ([("b", b"1")], "sample b needs one image, it has 0"),
        ([("b.cls", b"cat"), ("b.png", b"1")], "b.cls is b'cat', not a class number"),
        ([("b.cls", b""), ("b.png", b"1")], "b.cls is b'', not a class number"),
        ([("b.cls", b"1.5"), ("b.png", b"1")], "not a class number"),
        ([("b.cls", b"[0, 1]"), ("b.png", b"1")], "not a class number"),
        ([("b.cls", b"9" * 5000), ("b.png", b"1")], "not a class number"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(
    entries: list[tuple[str, bytes]], words: str, tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_bytes(archive(*(entry(name, data) for name, data in entries)))
    assert words in refusal(tmp_path / "a.tar")


@pytest.mark.parametrize("text", [b"99999999999", b"-3", b"1_0"])
def test_a_label_that_is_no_class_number_is_refused(text: bytes, tmp_path: Path) -> None:
    """The index has 32 bits for it, -1 stands for no label, and `int` reads 1_0 as ten."""
    (tmp_path / "a.tar").write_bytes(archive(entry("b.cls", text), entry("b.png", b"1")))
    assert "b.cls" in refusal(tmp_path / "a.tar")


def test_a_label_is_found_whatever_the_case_of_its_suffix(tmp_path: Path) -> None:
    """webdataset turns suffixes to lower case, and images are found in either."""
    (sample,) = scan(tmp_path / "a.tar", archive(entry("b.CLS", b"5"), entry("b.PNG", b"1")))
    assert sample.label == 5
