"""A build can be ended anywhere and goes on; what appears is complete and always the same bytes."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from ganscale.data.building import build_shards
from ganscale.data.shard_pool import num_processes, run_in_processes
from ganscale.data.shards import INDEX_NAME, ShardSet, verify_shards
from ganscale.data.sources import SourceSpec
from ganscale.errors import ConfigError, DataError

PROCEDURAL = SourceSpec("procedural")


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


def hashes(root: str | Path) -> dict[str, str]:
    files = sorted(Path(root).iterdir())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def partial(out: Path) -> Path:
    """Where a set grows."""
    return out.with_name(f".{out.name}.partial")


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """The shards that need not be built again: inode and time of each."""
    records = (path.name for path in folder.glob(".shard-*.tar.npz"))
    names = [name.removeprefix(".").removesuffix(".npz") for name in records]
    states = {name: (folder / name).stat() for name in names}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in states.items()}


def interrupted_build(spec: SourceSpec, out: Path, shards: int, **arguments: Any) -> None:
    """A build that is ended when so many shards are done."""
    done = []

    def progress(num_samples: int) -> None:
        done.append(num_samples)
        if len(done) == shards:
            raise Interrupted

    with pytest.raises(Interrupted):
        build_shards(spec, out, progress=progress, **arguments)


def own_folder(image_folder: Path, tmp_path: Path) -> tuple[SourceSpec, Path]:
    """A copy of the images that a test may change."""
    shutil.copytree(image_folder, tmp_path / "images")
    return SourceSpec("files", str(tmp_path / "images")), tmp_path / "images"


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("builds_here")
@pytest.mark.parametrize(
    ("folder", "num_images", "shards"),
    [("image_folder", 37, 1), ("image_folder", 37, 2), ("array_folder", 41, 2)],
)
def test_an_interrupted_build_goes_on_with_the_shards_it_has(
    request: pytest.FixtureRequest, tmp_path: Path, folder: str, num_images: int, shards: int
) -> None:
    spec = SourceSpec("files", str(request.getfixturevalue(folder)))
    out = tmp_path / "set"
    interrupted_build(spec, out, shards, num_shards=4)
    assert not out.exists()
    kept = finished(partial(out))
    assert shards <= len(kept) < 4
    counts: list[int] = []
    build_shards(spec, out, num_shards=4, progress=counts.append)
    assert {name: (out / name).stat().st_ino for name in kept} == {
        name: inode for name, (inode, _) in kept.items()
    }
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == {
        name: modified for name, (_, modified) in kept.items()
    }
    assert sum(counts) == num_images
    fresh = build_shards(spec, tmp_path / "fresh", num_shards=4)
    assert hashes(out) == hashes(fresh.location)
    assert not partial(out).exists()


@pytest.mark.usefixtures("builds_here")
def test_what_is_half_written_is_written_again(image_folder: Path, tmp_path: Path) -> None:
    spec = SourceSpec("files", str(image_folder))
    out = tmp_path / "set"
    interrupted_build(spec, out, 1, num_shards=4)
    kept = finished(partial(out))
    assert "shard-00003.tar" not in kept
    (partial(out) / ".shard-00003.tar.tmp").write_bytes(b"half" * 10_000)
    (partial(out) / "shard-00003.tar").write_bytes(b"without a record")
    (partial(out) / ".shard-00003.tar.npz.tmp").write_bytes(b"half")
    build_shards(spec, out, num_shards=4)
    fresh = build_shards(spec, tmp_path / "fresh", num_shards=4)
    assert hashes(out) == hashes(fresh.location)


@pytest.mark.usefixtures("builds_here")
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a record"])
def test_a_damaged_record_costs_its_shard_and_no_more(
    image_folder: Path, tmp_path: Path, content: bytes
) -> None:
    """Records are not synced to disk before they are renamed, so a power cut leaves empty ones."""
    spec = SourceSpec("files", str(image_folder))
    out = tmp_path / "set"
    interrupted_build(spec, out, 2, num_shards=4)
    name = min(finished(partial(out)))
    (partial(out) / f".{name}.npz").write_bytes(content)
    build_shards(spec, out, num_shards=4)
    fresh = build_shards(spec, tmp_path / "fresh", num_shards=4)
    assert hashes(out) == hashes(fresh.location)


@pytest.mark.usefixtures("builds_here")
@pytest.mark.parametrize(
    "other",
    [
        {"num_shards": 3},
        {"limit": 30},
        {"resolution": 8},
        {"img_channels": 1},
        {"resolution": 8, "fit": "pad"},
    ],
)
def test_what_another_build_left_is_not_used(
    image_folder: Path, tmp_path: Path, other: dict[str, Any]
) -> None:
    spec = SourceSpec("files", str(image_folder))
    out = tmp_path / "set"
    interrupted_build(spec, out, 2, num_shards=4)
    arguments: dict[str, Any] = {"num_shards": 4, **other}
    build_shards(spec, out, **arguments)
    fresh = build_shards(spec, tmp_path / "fresh", **arguments)
    assert hashes(out) == hashes(fresh.location)


@pytest.mark.usefixtures("builds_here")
@pytest.mark.parametrize("change", ["an image more", "another image under the same name"])
def test_what_was_built_from_other_images_is_not_used(
    image_folder: Path, tmp_path: Path, change: str
) -> None:
    spec, folder = own_folder(image_folder, tmp_path)
    out = tmp_path / "set"
    interrupted_build(spec, out, 3, num_shards=4)
    if change == "an image more":
        Image.new("RGB", (16, 16)).save(folder / "ant" / "new.png")
    else:
        for file in folder.glob("*/*.png"):
            Image.new("RGB", (16, 16), "red").save(file)
    build_shards(spec, out, num_shards=4)
    fresh = build_shards(spec, tmp_path / "fresh", num_shards=4)
    assert hashes(out) == hashes(fresh.location)


# Without a guard of its top level, which processes that build must not run again.
KILLED_BUILD = """
import sys
from ganscale.data.building import build_shards
from ganscale.data.sources import SourceSpec

build_shards(SourceSpec("procedural"), sys.argv[1], num_shards=20, limit=1500)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """Where a build of 20 shards was killed between its 3rd and last, and who outlived it."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "build.py").write_text(KILLED_BUILD)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "build.py", str(folder / "set")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    workers: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 600
        while len(finished(partial(folder / "set"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=60)
    finally:
        process.kill()
        process.wait()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        psutil.wait_procs(workers, timeout=60)
    return folder / "set", [worker.pid for worker in alive]


def test_the_processes_of_a_killed_build_end_with_it(killed: tuple[Path, list[int]]) -> None:
    """They would write on, into the files of the build that goes on, and then wait for ever."""
    _, alive = killed
    assert alive == []


@pytest.mark.usefixtures("builds_here")
def test_a_build_goes_on_after_sigkill(killed: tuple[Path, list[int]], tmp_path: Path) -> None:
    out, _ = killed
    assert not out.exists()
    kept = finished(partial(out))
    assert len(kept) >= 3
    build_shards(PROCEDURAL, out, num_shards=20, limit=1500)
    fresh = build_shards(PROCEDURAL, tmp_path / "fresh", num_shards=20, limit=1500)
    assert hashes(out) == hashes(fresh.location)
    for name, (inode, _) in kept.items():
        assert (out / name).stat().st_ino == inode
    assert verify_shards(ShardSet.load(out)) == []


def test_a_killed_process_of_a_build_says_that_it_can_go_on() -> None:
    with pytest.raises(DataError, match="run again to go on") as error:
        run_in_processes(os._exit, [(9,)], lambda num_samples: None)
    one_line(error)


@pytest.mark.usefixtures("builds_here")
def test_two_builders_of_one_set_are_one_too_many(tmp_path: Path) -> None:
    out = tmp_path / "set"
    building, may_go_on = threading.Event(), threading.Event()

    def progress(num_samples: int) -> None:
        building.set()
        assert may_go_on.wait(30)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(build_shards, PROCEDURAL, out, num_shards=2, limit=8, progress=progress)
        try:
            assert building.wait(30)
            with pytest.raises(ConfigError, match="being built by another process") as error:
                build_shards(PROCEDURAL, out, num_shards=2, limit=8)
            assert str(out) in one_line(error)
            with pytest.raises(ConfigError, match="being built by another process"):
                build_shards(PROCEDURAL, out, num_shards=4, limit=8)
        finally:
            may_go_on.set()
        assert first.result().num_samples == 8
    fresh = build_shards(PROCEDURAL, tmp_path / "fresh", num_shards=2, limit=8)
    assert hashes(out) == hashes(fresh.location)


@pytest.mark.usefixtures("builds_here")
def test_a_place_that_is_taken_while_building_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "set"

    def progress(num_samples: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").write_text("precious")

    with pytest.raises(ConfigError, match="is not empty") as error:
        build_shards(PROCEDURAL, out, num_shards=2, limit=8, progress=progress)
    one_line(error)
    assert hashes(out) == {"precious": hashlib.sha256(b"precious").hexdigest()}


@pytest.mark.usefixtures("builds_here")
def test_a_set_appears_with_its_index_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "set"
    seen: list[set[str]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                seen.append(set(os.listdir(out)))
            except FileNotFoundError:
                seen.append(set())

    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(watch)
        try:
            build_shards(
                PROCEDURAL,
                out,
                num_shards=20,
                limit=200,
                progress=lambda _: seen.append(set(os.listdir(out)) if out.exists() else set()),
            )
            complete, deadline = set(os.listdir(out)), time.monotonic() + 600
            while complete not in seen and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            done.set()
        watcher.result()
    assert INDEX_NAME in complete
    assert all(names in (set(), complete) for names in seen)
    assert set() in seen
    assert complete in seen


def mixed_folder(root: Path) -> Path:
    """Gray, RGB and RGBA images of many sizes and formats in two classes."""
    rng = np.random.default_rng(0)
    for number, (kind, channels) in enumerate(
        [("png", 1), ("png", 3), ("png", 4), ("jpg", 1), ("jpg", 3), ("webp", 3), ("bmp", 3)] * 2
    ):
        pixels = rng.integers(0, 256, (20 + number, 33 - number, channels), dtype=np.uint8)
        path = root / "ab"[number % 2] / f"{number:02d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze()).save(path)
    return root


def images_of(shard_set: ShardSet) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """Every image of a set by its key, (H, W, C), read by tarfile and Pillow."""
    found = {}
    for shard in shard_set.shards:
        with tarfile.open(f"{shard_set.location}/{shard.name}") as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    file = tar.extractfile(member)
                    assert file is not None
                    with Image.open(io.BytesIO(file.read())) as image:
                        pixels = np.asarray(image)
                    found[member.name[:-4]] = pixels.reshape(*pixels.shape[:2], -1)
    return found


@pytest.mark.usefixtures("builds_here")
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("resolution", [8, 16])
def test_images_of_any_kind_are_made_alike(tmp_path: Path, channels: int, resolution: int) -> None:
    folder = mixed_folder(tmp_path / "images")
    spec = SourceSpec("files", str(folder))
    options: dict[str, Any] = {"resolution": resolution, "img_channels": channels, "num_shards": 3}
    built = build_shards(spec, tmp_path / "set", **options)
    again = build_shards(spec, tmp_path / "again", **options)
    assert built.image_shape == (channels, resolution, resolution)
    assert hashes(built.location) == hashes(again.location)
    found = images_of(built)
    files = sorted(folder.glob("*/*"))
    assert sorted(found) == [f"{number:06d}" for number in range(len(files))]
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    for key, pixels in found.items():
        with Image.open(files[int(key)]) as image:
            converted = image.convert(mode)
            if image.mode == "RGBA" and channels < 4:
                white = Image.new("RGBA", image.size, "white")
                converted = Image.alpha_composite(white, image).convert("RGB").convert(mode)
        side = min(converted.size)
        left, top = (converted.width - side) / 2, (converted.height - side) / 2
        box = (left, top, left + side, top + side)
        size = (resolution, resolution)
        expected = np.asarray(converted.resize(size, Image.Resampling.LANCZOS, box=box))
        difference = pixels.astype(int) - expected.reshape(pixels.shape)
        assert np.abs(difference).max() <= 1


@pytest.mark.usefixtures("builds_here")
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mean_and_deviation_are_those_of_all_pixels(tmp_path: Path, channels: int) -> None:
    spec = SourceSpec("files", str(mixed_folder(tmp_path / "images")))
    built = build_shards(spec, tmp_path / "set", resolution=16, img_channels=channels, num_shards=3)
    values = np.stack(list(images_of(built).values())).reshape(-1, channels).astype(np.float64)
    np.testing.assert_allclose(built.pixel_mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(built.pixel_std, values.std(0), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("builds_here")
def test_one_flat_colour_has_no_deviation(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (7, 131, 255)).save(tmp_path / "images" / f"{number}.png")
    spec = SourceSpec("files", str(tmp_path / "images"))
    built = build_shards(spec, tmp_path / "set", num_shards=2)
    assert built.pixel_mean == (7.0, 131.0, 255.0)
    assert built.pixel_std == (0.0, 0.0, 0.0)


@pytest.mark.usefixtures("builds_here")
@pytest.mark.parametrize(
    ("num_shards", "num_streams", "expected"),
    [(1, None, 1), (5, None, 5), (70, None, 64), (70, 70, 70), (5, 1, 1), (5, 3, 3), (5, 5, 5)],
)
def test_there_are_as_many_streams_as_asked_for(
    tmp_path: Path, num_shards: int, num_streams: int | None, expected: int
) -> None:
    built = build_shards(
        PROCEDURAL, tmp_path / "set", num_shards=num_shards, num_streams=num_streams, limit=70
    )
    assert built.num_streams == expected
    assert ShardSet.load(tmp_path / "set").num_streams == expected
    assert len(built.shards) == num_shards


@pytest.mark.usefixtures("builds_here")
@pytest.mark.parametrize("num_streams", [0, -1, 6])
def test_streams_without_shards_are_refused(tmp_path: Path, num_streams: int) -> None:
    with pytest.raises(ConfigError, match=r"--num-streams must be in 1\.\.5") as error:
        build_shards(PROCEDURAL, tmp_path / "set", num_shards=5, num_streams=num_streams, limit=10)
    one_line(error)
    assert not (tmp_path / "set").exists()


@pytest.mark.usefixtures("builds_here")
def test_a_wrong_number_of_streams_is_refused_before_hours_of_building(tmp_path: Path) -> None:
    counts: list[int] = []
    with pytest.raises(ConfigError, match="--num-streams"):
        build_shards(
            PROCEDURAL,
            tmp_path / "set",
            num_shards=5,
            num_streams=6,
            limit=10,
            progress=counts.append,
        )
    assert counts == []


@pytest.mark.usefixtures("builds_here")
def test_borders_are_for_images_that_are_resized(
    image_folder: Path, array_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--fit pad .* give --resolution"):
        build_shards(SourceSpec("files", str(image_folder)), tmp_path / "set", fit="pad")
    arrays = SourceSpec("files", str(array_folder))
    with pytest.raises(DataError, match="array of floats; --fit pad is for images"):
        build_shards(arrays, tmp_path / "set", resolution=8, fit="pad", num_shards=1)


@pytest.mark.usefixtures("builds_here")
@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("other", [(32, 32, "RGB"), (16, 16, "RGBA"), (16, 16, "L")])
def test_images_that_disagree_are_named_with_what_to_do(
    tmp_path: Path, num_shards: int, other: tuple[int, int, str]
) -> None:
    """With two shards of one image each, no shard disagrees in itself."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "0.png")
    Image.new(other[2], other[:2]).save(tmp_path / "images" / "1.png")
    spec = SourceSpec("files", str(tmp_path / "images"))
    with pytest.raises(DataError, match="others have") as error:
        build_shards(spec, tmp_path / "set", num_shards=num_shards)
    message = one_line(error)
    assert "--resolution" in message
    assert "--img-channels" in message
    assert not (tmp_path / "set").exists()
    assert f"{tmp_path / 'images'}" in message
    assert ".png" in message


@pytest.mark.usefixtures("builds_here")
def test_an_image_of_no_trainable_size_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (24, 20)).save(tmp_path / "images" / "0.png")
    spec = SourceSpec("files", str(tmp_path / "images"))
    with pytest.raises(DataError, match="images/0.png is 24x20") as error:
        build_shards(spec, tmp_path / "set", num_shards=1)
    assert "--resolution" in one_line(error)


@pytest.mark.usefixtures("builds_here")
def test_the_folders_above_a_set_are_made(tmp_path: Path) -> None:
    built = build_shards(PROCEDURAL, tmp_path / "a" / "b" / "set", num_shards=1, limit=2)
    assert built.location == str(tmp_path / "a" / "b" / "set")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["set"]


@pytest.mark.usefixtures("builds_here")
def test_an_empty_folder_is_a_place_for_a_set(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    build_shards(PROCEDURAL, tmp_path / "set", num_shards=1, limit=2)
    assert set(hashes(tmp_path / "set")) == {INDEX_NAME, "samples.npy", "shard-00000.tar"}


@pytest.mark.parametrize("limit", [100, 500, 501])
def test_a_part_of_a_set_whose_classes_take_turns_has_all_of_them(
    tmp_path: Path, limit: int
) -> None:
    shard_set = build_shards(SourceSpec("procedural"), tmp_path / "set", num_shards=2, limit=limit)
    counts = np.bincount(shard_set.samples["label"], minlength=10)
    assert counts.sum() == limit
    assert counts.min() > limit / 20


def test_as_many_processes_build_as_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may have fewer cores than its machine."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2, 3})
    assert [num_processes(num_jobs) for num_jobs in (2, 8)] == [2, 3]
