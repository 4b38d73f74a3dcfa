"""A checkpoint comes back bit by bit, from a directory or S3, or an older one is used instead."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ganscale.checkpoint import (
    Attempt,
    CheckpointName,
    CheckpointStore,
    DamagedCheckpointWarning,
)
from ganscale.checkpoint.encoding import flatten
from ganscale.checkpoint.files import saved_state
from ganscale.errors import CheckpointError, ConfigError
from tests.support.checkpoints import Raw, begin, bits, newest, state_at, write

FILES = ("state.safetensors", "state.json", "meta.json", "metrics.jsonl", "manifest.json")
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)


def full_state() -> dict[str, Any]:
    noise = torch.randint(0, 256, (48,), dtype=torch.uint8, generator=torch.manual_seed(0))
    image = torch.arange(120.0).view(2, 3, 4, 5)
    return {
        "dtypes": [noise.view(t) if t != torch.bool else noise > 99 for t in DTYPES],
        "shapes": (torch.empty(0), torch.empty(3, 0, 2), torch.tensor(7), torch.tensor(True)),
        "layouts": [image.to(memory_format=torch.channels_last), image.permute(3, 0, 2, 1)],
        "slices": [image[:, 1], image[..., ::2], torch.ones(1).expand(4)],
        "floats": [float("inf"), float("-inf"), float("nan"), -0.0, 1e-45, 0.1, 5e-324],
        "others": (None, True, 0, 2**80, "", 'a "b"\n\u00e9\U0001f600', [], (), {}),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 11: {"step": (1, [2])}}},
    }


def test_every_kind_of_value_comes_back_bit_by_bit(store: CheckpointStore) -> None:
    name = store.write(begin(store), saved_state(5, full_state(), {"run": "test"}))
    files = store.newest()
    assert files is not None
    assert (files.name, files.history, store.verify(name)) == (name, b"", None)
    assert bits(files.state()) == bits(full_state())


@pytest.mark.parametrize(
    "value", [{1}, b"bytes", Path("/"), torch.ones(2, dtype=torch.complex64)], ids=str
)
def test_what_would_not_come_back_is_not_saved(value: Any) -> None:
    with pytest.raises(TypeError, match="/a/0 is .*, which a checkpoint cannot hold"):
        flatten({"a": [value]})


def test_the_tensor_file_is_a_safetensors_file(local: CheckpointStore) -> None:
    name = local.write(begin(local), saved_state(5, full_state(), {}))
    loaded = load_file(Path(local.where(name)) / "state.safetensors")
    assert bits(loaded["/layouts/0"]) == bits(full_state()["layouts"][0])
    assert bits([loaded[f"/dtypes/{n}"] for n in range(len(DTYPES))]) == bits(
        full_state()["dtypes"]
    )
    assert len(loaded) == len(flatten(full_state())[1])


def test_meta_is_for_people_and_has_the_digest_of_the_tensors(local: CheckpointStore) -> None:
    name = write(local, begin(local), 7)
    digest = hashlib.sha256(Raw(local).get(f"{name}/state.safetensors")).hexdigest()
    files = local.read(name)
    assert files.meta == {"run": "test", "tensors_sha256": digest}
    assert files.history == b'{"nimg": 1}\n'
    assert local.metrics(name) == {"score": 1e-05}


def digest_of(store: CheckpointStore, state: Any) -> str:
    name = store.write(Attempt(1, None, 0, "", "start"), saved_state(1, state, {}))
    digest: str = store.read(name).meta["tensors_sha256"]
    return digest


def base(**changes: Any) -> dict[str, Any]:
    return {"x": torch.tensor([1.0, 0.0]), "y": torch.zeros(2, 3), **changes}


def test_the_same_tensors_give_the_same_bytes(local: CheckpointStore) -> None:
    same = {"n": 3, "y": torch.zeros(3, 2).t(), "x": torch.tensor([1.0, 0.0])}
    assert digest_of(local, same) == digest_of(local, base())


@pytest.mark.parametrize(
    "other",
    [
        base(x=torch.tensor([1.0, 1e-45])),
        base(x=torch.tensor([1.0, -0.0])),
        base(x=torch.tensor([0.0, 1.0])),
        base(y=torch.zeros(2, 3, dtype=torch.int32)),
        base(y=torch.zeros(3, 2)),
        base(y=torch.zeros(6)),
        base(z=torch.zeros(0)),
    ],
    ids=["value", "sign", "places", "dtype", "shape", "rank", "more"],
)
def test_other_tensors_give_other_bytes(local: CheckpointStore, other: Any) -> None:
    assert digest_of(local, other) != digest_of(local, base())


def test_strangers_are_ignored(local: CheckpointStore) -> None:
    attempt = begin(local)
    names = [write(local, attempt, nimg) for nimg in (900, 10_000, 5)]
    for path in ("other/manifest.json", "nimg-000000020000-a0001", "attempts/a7.json.orig"):
        (Path(local.location) / path).parent.mkdir(exist_ok=True)
        (Path(local.location) / path).write_text("{}")
    assert local.names() == sorted(names)
    assert local.attempts() == [attempt]
    assert newest(local) == names[1]
    assert begin(local).number == 2


def test_where_there_is_nothing_there_is_no_checkpoint(store: CheckpointStore) -> None:
    assert (newest(store), store.names(), store.attempts(), store.repair()) == (None, [], [], [])


@pytest.mark.parametrize(("url", "words"), [("http://a/b", "written"), ("nosuch://a", "opened")])
def test_a_place_that_cannot_be_written_to_is_a_wrong_setting(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{url} cannot be {words}"):
        CheckpointStore(url)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return b""


def flip(data: bytes) -> bytes:
    return bytes([*data[: len(data) // 2], data[len(data) // 2] ^ 1, *data[len(data) // 2 + 1 :]])


def append(data: bytes) -> bytes:
    return data + b"\n"


def binary(data: bytes) -> bytes:
    return b"\xff\xfe\x00"


def a_list(data: bytes) -> bytes:
    return b"[]"


def better_metric(data: bytes) -> bytes:
    return data.replace(b'"score": 1e-05', b'"score": 1e+05')


def one_file_less(data: bytes) -> bytes:
    manifest = json.loads(data)
    del manifest["files"]["state.json"]
    return json.dumps(manifest).encode()


Change = Callable[[bytes], bytes]
DAMAGES: list[tuple[str, Change | None]] = [
    *((file, change) for file in FILES for change in (cut, empty, flip, append)),
    *((file, None) for file in FILES[:-1]),
    *((FILES[-1], change) for change in (binary, a_list, better_metric, one_file_less)),
]


@pytest.mark.parametrize(("file", "change"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_an_older_one_used(
    local: CheckpointStore, file: str, change: Change | None
) -> None:
    attempt = begin(local)
    older, newer = write(local, attempt, 1), write(local, attempt, 2)
    path = Path(local.where(newer)) / file
    if change is None:
        path.unlink()
    else:
        before = path.read_bytes()
        path.write_bytes(change(before))
        assert path.read_bytes() != before
    problem = local.verify(newer)
    assert problem is not None
    assert file in problem
    assert "\n" not in problem
    with pytest.warns(DamagedCheckpointWarning) as caught:
        files = local.newest()
    assert files is not None
    assert (files.name, bits(files.state())) == (older, bits(state_at(1)))
    assert [str(w.message) for w in caught] == [
        f"checkpoint {local.where(newer)} is damaged: {problem}; trying an older one"
    ]


def test_every_damaged_checkpoint_is_named(store: CheckpointStore) -> None:
    attempt, raw = begin(store), Raw(store)
    names = [write(store, attempt, nimg) for nimg in range(1, 6)]
    tensors = [f"{name}/state.safetensors" for name in names]
    raw.put(tensors[1], cut(raw.get(tensors[1])))
    raw.put(tensors[2], flip(raw.get(tensors[2])))
    raw.remove(tensors[3])
    raw.put(f"{names[4]}/manifest.json", raw.get(f"{names[0]}/manifest.json"))
    with pytest.warns(DamagedCheckpointWarning) as caught:
        files = store.newest()
    assert files is not None
    assert files.name == names[0]
    words = ["belongs to another checkpoint", "is missing", "wrong sha256", "bytes, expected"]
    for warning, name, word in zip(caught, names[:0:-1], words, strict=True):
        assert store.where(name) in str(warning.message)
        assert word in str(warning.message)


def test_a_folder_without_manifest_does_not_count(store: CheckpointStore) -> None:
    attempt = begin(store)
    older, newer = write(store, attempt, 1), write(store, attempt, 2)
    Raw(store).remove(f"{newer}/manifest.json")
    assert newest(store) == older
    assert [folder.path for folder in store.unfinished()] == [str(newer)]


def test_any_flipped_bit_is_found(local: CheckpointStore) -> None:
    name = write(local, begin(local), 1)
    for file in FILES:
        path = Path(local.where(name)) / file
        sound = path.read_bytes()
        for place in range(len(sound)):
            for bit in {place % 8, 5}:  # 5 turns the e of a number into E
                damaged = bytearray(sound)
                damaged[place] ^= 1 << bit
                path.write_bytes(damaged)
                assert local.verify(name) is not None, f"{file}, byte {place}, bit {bit}"
        path.write_bytes(sound)
        assert local.verify(name) is None


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def replace_and_seal(store: CheckpointStore, name: CheckpointName, file: str, data: bytes) -> None:
    """As someone would who knows the format and wants `data` to be loaded."""
    raw = Raw(store)
    raw.put(f"{name}/{file}", data)
    manifest = json.loads(raw.get(f"{name}/manifest.json"))
    manifest["files"][file] = {
        "num_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    del manifest["sha256"]
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**manifest, "sha256": seal}, indent=2)
    raw.put(f"{name}/manifest.json", text.encode())
    assert store.verify(name) is None


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "meta.json"])
def test_stored_code_is_refused_and_not_executed(
    local: CheckpointStore, tmp_path: Path, file: str
) -> None:
    attempt = begin(local)
    older, newer = write(local, attempt, 1), write(local, attempt, 2)
    pickled = io.BytesIO()
    torch.save(Payload(tmp_path / "touched"), pickled)
    torch.load(io.BytesIO(pickled.getvalue()), weights_only=False)
    (tmp_path / "touched").unlink()  # the payload works

    replace_and_seal(local, newer, file, pickled.getvalue())
    with pytest.warns(DamagedCheckpointWarning) as caught:
        files = local.newest()
    assert files is not None
    assert files.name == older
    (message,) = [str(w.message) for w in caught]
    assert local.where(newer) in message
    assert not (tmp_path / "touched").exists()


def test_a_state_may_be_refused_for_what_is_in_it(local: CheckpointStore) -> None:
    attempt = begin(local)
    for nimg in (1, 2, 3):
        write(local, attempt, nimg)
    with pytest.warns(DamagedCheckpointWarning, match="damaged: odd; trying") as caught:
        files = local.newest(accept=lambda state: "odd" if state["nimg"] % 2 else None)
    assert len(caught) == 1
    assert files is not None
    assert files.name.nimg == 2
    found = local.newest(up_to=1)
    assert found is not None
    assert found.name.nimg == 1


class PowerCut(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize(("name", "number"), [*(("fsync", n) for n in range(1, 7)), ("rename", 1)])
def test_a_crash_while_writing_leaves_the_older_one(
    local: CheckpointStore, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    attempt = begin(local)
    older = write(local, attempt, 1)
    before = Raw(local).all()
    calls = 0
    original = getattr(os, name)

    def crash(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise PowerCut
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, crash)
        with pytest.raises(PowerCut):
            write(local, attempt, 2)
    assert Raw(local).all() == before
    assert newest(local) == older
    assert newest(local) != write(local, attempt, 2) == newest(local)


def test_a_checkpoint_may_be_written_again(store: CheckpointStore) -> None:
    attempt = begin(store)
    name = write(store, attempt, 1)
    Raw(store).put(f"{name}/state.json", b"")
    assert write(store, attempt, 1) == name
    assert store.verify(name) is None
    assert newest(store) == name


def test_a_refusal_by_the_store_is_no_damage(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write(store, begin(store), 1)

    def refuse(file: str) -> Iterator[bytes]:
        raise PermissionError("Access Denied")

    with monkeypatch.context() as patch:
        patch.setattr(store.backend, "chunks", refuse)
        for action in (store.newest, store.repair, lambda: store.verify(name)):
            with pytest.raises(PermissionError):
                action()
    assert newest(store) == name


def test_an_unreadable_checkpoint_is_an_error_in_one_line(local: CheckpointStore) -> None:
    name = write(local, begin(local), 1)
    Raw(local).put(f"{name}/state.json", b'{"tensor": "/none"}')
    with pytest.raises(CheckpointError, match=r"state\.json has 19 bytes, expected"):
        local.read(name)
    Raw(local).remove(f"{name}/state.json")
    with pytest.raises(CheckpointError, match=r"state\.json is missing"):
        local.read(name)
