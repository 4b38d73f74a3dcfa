"""A checkpoint is complete and verified, or it is passed over for an older one that is."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ganscale.checkpoint import (
    Checkpoint,
    DamagedCheckpointWarning,
    list_checkpoints,
    load_state,
    newest_valid,
    save_checkpoint,
    tensor_digest,
    verify_checkpoint,
)
from ganscale.errors import CheckpointError


def state_at(nimg: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(nimg)
    return {
        "G": {"weight": torch.randn(4, 3, generator=generator), "count": torch.tensor(nimg)},
        "optimizer": {"state": [torch.arange(5, dtype=torch.float64)], "lr": 1e-3},
        "empty": torch.empty(0),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "nimg": nimg,
    }


def save(folder: Path, nimg: int, *, keep_last: int = 10) -> Checkpoint:
    return save_checkpoint(
        folder, state_at(nimg), meta={"run": "test"}, nimg=nimg, keep_last=keep_last
    )


def numbers(folder: Path) -> list[int]:
    return [checkpoint.nimg for checkpoint in list_checkpoints(folder)]


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1000)
    assert verify_checkpoint(checkpoint) is None
    assert newest_valid(tmp_path) == checkpoint
    expected, loaded = state_at(1000), load_state(checkpoint)
    assert tensor_digest(loaded) == tensor_digest(expected)
    assert torch.equal(loaded["G"]["weight"], expected["G"]["weight"])
    assert (loaded["nimg"], loaded["optimizer"]["lr"]) == (1000, 1e-3)


def test_meta_is_for_people_and_has_the_digest(tmp_path: Path) -> None:
    meta = json.loads((save(tmp_path, 7).path / "meta.json").read_text())
    assert meta == {"run": "test", "nimg": 7, "tensors_sha256": tensor_digest(state_at(7))}


def test_checkpoints_are_listed_oldest_first_and_strangers_ignored(tmp_path: Path) -> None:
    for nimg in (900, 10_000, 5):
        save(tmp_path, nimg)
    (tmp_path / "nimg-later").mkdir()
    (tmp_path / "nimg-000000000007").write_text("a file")
    (tmp_path / "other").mkdir()
    assert numbers(tmp_path) == [5, 900, 10_000]


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_no_checkpoints_are_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    assert newest_valid(tmp_path / name) is None


def truncate_state(path: Path) -> None:
    data = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(data[: len(data) // 2])


def empty_state(path: Path) -> None:
    (path / "state.pt").write_bytes(b"")


def flip_byte_of_state(path: Path) -> None:
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 0x01
    (path / "state.pt").write_bytes(data)


def flip_byte_of_meta(path: Path) -> None:
    data = bytearray((path / "meta.json").read_bytes())
    data[10] ^= 0x01
    (path / "meta.json").write_bytes(data)


def remove_state(path: Path) -> None:
    (path / "state.pt").unlink()


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def truncate_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"files": {')


def replace_manifest_by_binary(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\xff\xfe\x00")


def replace_manifest_by_list(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def forget_state_in_manifest(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["state.pt"]
    (path / "manifest.json").write_text(json.dumps(manifest))


def remove_everything(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


DAMAGES = (
    truncate_state,
    empty_state,
    flip_byte_of_state,
    flip_byte_of_meta,
    remove_state,
    remove_manifest,
    truncate_manifest,
    replace_manifest_by_binary,
    replace_manifest_by_list,
    forget_state_in_manifest,
    remove_everything,
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    damage(newer.path)
    problem = verify_checkpoint(newer)
    assert problem
    assert "\n" not in problem
    with pytest.warns(DamagedCheckpointWarning) as caught:
        assert newest_valid(tmp_path) == older
    (message,) = [str(w.message) for w in caught]
    assert str(newer.path) in message
    assert problem in message


def test_every_damaged_checkpoint_is_warned_of(tmp_path: Path) -> None:
    for nimg in (1, 2, 3):
        truncate_state(save(tmp_path, nimg).path)
    with pytest.warns(DamagedCheckpointWarning) as caught:
        assert newest_valid(tmp_path) is None
    assert len(caught) == 3


def test_any_single_flipped_byte_is_found(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    path = checkpoint.path / "state.pt"
    sound = path.read_bytes()
    for place in range(0, len(sound), 37):
        damaged = bytearray(sound)
        damaged[place] ^= 0x80
        path.write_bytes(damaged)
        assert verify_checkpoint(checkpoint) == "state.pt has the wrong sha256"
    path.write_bytes(sound)
    assert verify_checkpoint(checkpoint) is None


def test_a_folder_of_a_killed_writer_is_ignored_and_removed_by_the_next(tmp_path: Path) -> None:
    older = save(tmp_path, 1)
    leftover = tmp_path / ".tmp-nimg-000000000002"
    shutil.copytree(older.path, leftover)
    truncate_state(leftover)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_valid(tmp_path) == older
    newer = save(tmp_path, 3)
    assert newest_valid(tmp_path) == newer
    assert not leftover.exists()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for nimg in range(1, 6):
        save(tmp_path, nimg, keep_last=2)
        assert numbers(tmp_path) == list(range(max(1, nimg - 1), nimg + 1))


def test_damaged_checkpoints_do_not_count_among_those_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    truncate_state(save(tmp_path, 3).path)
    resumed = save(tmp_path, 2, keep_last=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedCheckpointWarning)
        assert newest_valid(tmp_path) == resumed


def test_a_checkpoint_that_verifies_is_not_written_again(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    before = (first.path / "state.pt").stat().st_mtime_ns
    assert save(tmp_path, 1) == first
    assert (first.path / "state.pt").stat().st_mtime_ns == before


def test_a_damaged_checkpoint_is_written_again(tmp_path: Path) -> None:
    truncate_state(save(tmp_path, 1).path)
    assert verify_checkpoint(save(tmp_path, 1)) is None


class PowerCut(Exception):
    """Stands for a crash."""


def crash_at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> None:
    """Let the `number`-th call from now on raise instead."""
    original = getattr(owner, name)
    calls = 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise PowerCut
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (torch, "save", 1),
        (Path, "write_text", 1),
        (Path, "write_text", 2),
        (os, "fsync", 1),
        (os, "fsync", 2),
        (os, "fsync", 3),
        (os, "fsync", 4),
        (Path, "replace", 1),
    ],
)
def test_a_crash_while_writing_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int
) -> None:
    older = save(tmp_path, 1, keep_last=1)
    with monkeypatch.context() as patch:
        crash_at_call(patch, owner, name, number)
        with pytest.raises(PowerCut):
            save(tmp_path, 2, keep_last=1)
    assert verify_checkpoint(older) is None
    assert newest_valid(tmp_path) == older
    assert newest_valid(tmp_path) == older
    again = save(tmp_path, 2, keep_last=1)
    assert newest_valid(tmp_path) == again
    assert numbers(tmp_path) == [2]
    assert [p.name for p in tmp_path.iterdir()] == [again.path.name]


def test_nothing_is_pruned_before_the_new_one_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, keep_last=1)
    with monkeypatch.context() as patch:
        crash_at_call(patch, os, "fsync", 5)
        with pytest.raises(PowerCut):
            save(tmp_path, 2, keep_last=1)
    assert numbers(tmp_path) == [1, 2]


def test_a_state_that_cannot_be_read_is_an_error_in_one_line(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    truncate_state(checkpoint.path)
    with pytest.raises(CheckpointError) as error:
        load_state(checkpoint)
    assert str(checkpoint.path) in str(error.value)
    assert "\n" not in str(error.value)


def test_stored_code_is_not_executed(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    torch.save({"path": Path("/")}, checkpoint.path / "state.pt")
    with pytest.raises(CheckpointError):
        load_state(checkpoint)


def base_state() -> dict[str, Any]:
    return {"a": {"x": torch.tensor([1.0, 0.0]), "y": torch.zeros(2, 3)}, "b": [torch.ones(1)]}


def test_the_digest_ignores_the_order_of_names_memory_layout_and_what_is_no_tensor() -> None:
    layout = torch.zeros(3, 2).t()
    assert not layout.is_contiguous()
    same = {"b": [torch.ones(1)], "n": 3, "a": {"y": layout, "x": torch.tensor([1.0, 0.0])}}
    assert tensor_digest(same) == tensor_digest(base_state())


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.tensor([1.0, 1e-45]), "y": torch.zeros(2, 3)},
        {"x": torch.tensor([1.0, -0.0]), "y": torch.zeros(2, 3)},
        {"x": torch.tensor([0.0, 1.0]), "y": torch.zeros(2, 3)},
        {"x": torch.tensor([1.0, 0.0], dtype=torch.float64), "y": torch.zeros(2, 3)},
        {"x": torch.tensor([1.0, 0.0]), "y": torch.zeros(2, 3, dtype=torch.int32)},
        {"x": torch.tensor([1.0, 0.0]), "y": torch.zeros(3, 2)},
        {"x": torch.tensor([1.0, 0.0]), "y": torch.zeros(6)},
        {"x": torch.tensor([1.0, 0.0]), "z": torch.zeros(2, 3)},
        {"x": torch.tensor([1.0, 0.0])},
    ],
    ids=["value", "sign", "places", "dtype", "dtype of zeros", "shape", "rank", "name", "fewer"],
)
def test_the_digest_changes_with_value_dtype_shape_and_name(change: dict[str, Any]) -> None:
    assert tensor_digest({**base_state(), "a": change}) != tensor_digest(base_state())
