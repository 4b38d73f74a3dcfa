"""A directory and a bucket do the same, and what fails is retried until the deadline."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from ganscale.errors import ConfigError, DataError
from ganscale.storage import (
    LocalStore,
    MissingData,
    RetryPolicy,
    Span,
    Store,
    StoreError,
    objects,
    open_store,
    retry,
)
from ganscale.storage.objects import ObjectStore

QUICK = RetryPolicy(deadline_seconds=0.1, first_delay_seconds=0.01, max_delay_seconds=0.02)


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        return open_store(tmp_path / "files", for_writing=True)
    bucket = request.getfixturevalue("bucket")
    return open_store(f"{bucket}/{tmp_path.name}", QUICK, for_writing=True)


@pytest.fixture
def small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of more than 1000 bytes take several requests."""
    monkeypatch.setattr(objects, "_PIECE_BYTES", 700)
    monkeypatch.setattr(objects, "_PART_BYTES", 1000)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)


def numbered(num_bytes: int) -> bytes:
    return bytes(number % 251 for number in range(num_bytes))


@pytest.mark.parametrize("num_bytes", [0, 1, 699, 700, 1000, 1001, 9999])
@pytest.mark.usefixtures("small_requests")
def test_files_of_every_size_come_back(store: Store, num_bytes: int) -> None:
    data = numbered(num_bytes)
    pieces: list[bytes | memoryview] = [data[:333], memoryview(data)[333:5000], data[5000:]]
    for file in ("a.bin", "of a folder/a #1~b%20.bin"):
        store.replace(file, pieces)
        assert store.read(file) == b"".join(store.chunks(file)) == data
        with store.local_copy(file, num_bytes) as path:
            assert path.read_bytes() == data
    with store.new_folder("whole") as add:
        add("a.bin", iter(pieces))
        assert "whole/a.bin" not in store.files() or not isinstance(store, LocalStore)
    assert store.files() == ["a.bin", "of a folder/a #1~b%20.bin", "whole/a.bin"]
    store.replace("a.bin", [b"shorter"])
    assert store.read("a.bin") == b"shorter"
    store.move_folder("whole", "aside/whole")
    assert store.read("aside/whole/a.bin") == data
    store.remove_folder("aside/whole")
    store.remove("a.bin")
    store.remove("a.bin")
    assert [store.exists(file) for file in ("a.bin", "of a folder/a #1~b%20.bin")] == [False, True]


def test_ranges_come_back_and_what_is_missing_is_told_apart(store: Store) -> None:
    data = numbered(1000)
    store.replace("a.bin", [data])
    spans = [Span("a.bin", 0, 10), Span("a.bin", 990, 10), Span("a.bin", 5, 900)]
    assert store.read_spans(spans) == [data[:10], data[990:], data[5:905]]
    beyond, past, absent = store.read_spans(
        [Span("a.bin", 2000, 10), Span("a.bin", 995, 10), Span("b.bin", 0, 10)]
    )
    assert isinstance(beyond, MissingData)
    assert isinstance(past, MissingData)
    assert isinstance(absent, MissingData)
    assert "a.bin is truncated" in str(beyond)
    assert "ends at byte 1000 of a sample that reaches to byte 1005" in str(past)
    assert f"{store.location}/b.bin" in str(absent)
    for read in (store.read, lambda name: list(store.chunks(name))):
        with pytest.raises(MissingData, match=r"/b\.bin"):
            read("b.bin")


def test_one_of_many_writers_creates_a_file(store: Store) -> None:
    barrier, created = threading.Barrier(8), []
    # S3 creates in one step; the server of the tests looks first and creates then, so its requests
    # come one at a time.
    turn = threading.Lock() if isinstance(store, ObjectStore) else nullcontext()

    def create(number: int) -> None:
        barrier.wait(10)
        with turn:
            if store.create("claim", b"%d" % number):
                created.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(created) == 1
    assert store.read("claim") == b"%d" % created[0]
    assert not store.create("claim", b"later")


def test_a_folder_that_is_not_finished_has_no_last_file(store: Store) -> None:
    def broken() -> Iterator[bytes]:
        yield b"some"
        raise RuntimeError("of the writer")

    def write() -> None:
        with store.new_folder("half") as add:
            add("first", [b"all"])
            add("manifest.json", broken())

    with pytest.raises(RuntimeError, match="of the writer"):
        write()
    assert not store.exists("half/manifest.json")


def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    store = open_store(f"{bucket}-of-another/run", QUICK, for_writing=True)
    with pytest.raises(MissingData, match=r"s3://runs-of-another/run/claim: no such bucket"):
        store.create("claim", b"")


@pytest.mark.parametrize("url", ["foo://x", "memory://x", "az://container/x"])
def test_what_cannot_be_opened_is_an_error_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match=f"{url} cannot be opened") as error:
        open_store(url)
    assert "\n" not in str(error.value)


def test_a_web_server_is_only_read_and_a_file_url_is_a_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="http://x/y cannot be written to"):
        open_store("http://x/y", for_writing=True)
    store = open_store(f"file://{tmp_path}/a%20b")
    assert isinstance(store, LocalStore)
    assert store.root == tmp_path / "a b"


def test_a_profile_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(ConfigError, match=r"s3://runs cannot be opened: .*absent"):
        open_store("s3://runs")


class Failing:
    """Fails some times, and then returns how often it was called."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.num_calls = 0

    def __call__(self) -> int:
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.num_calls


def test_what_may_pass_is_retried_and_nothing_else() -> None:
    failing = Failing(ConnectionError("cut"), TimeoutError(), OSError(28, "No space left"))
    assert retry(failing, QUICK, "it failed") == 4
    for error in (DataError("damaged"), PermissionError("no"), TypeError("a bug")):
        failing = Failing(error)
        with pytest.raises(type(error), match=str(error)):
            retry(failing, QUICK, "it failed")
        assert failing.num_calls == 1


def test_after_the_deadline_the_last_error_is_told() -> None:
    failing = Failing(*[ConnectionError(f"cut\n{number}") for number in range(1000)])
    with pytest.raises(StoreError) as error:
        retry(failing, QUICK, "x could not be read")
    last = failing.num_calls - 1
    assert str(error.value) == (
        f"x could not be read within 0.1 s, {last + 1} attempts; last: ConnectionError: cut {last}"
    )
    assert isinstance(error.value.__cause__, ConnectionError)


def test_whoever_waits_may_end_it() -> None:
    waited: list[float] = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        return len(waited) == 3

    failing = Failing(*[OSError("busy")] * 10)
    with pytest.raises(StoreError, match="3 attempts; last: OSError: busy"):
        retry(failing, RetryPolicy(60, first_delay_seconds=1), "it failed", wait)
    longest = (1, 2, 4)
    assert all(most / 2 <= s <= most for s, most in zip(waited, longest, strict=True))
