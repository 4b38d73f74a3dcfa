"""Compiled runs: bits after a restart, with kernels that are there and that are built anew.

Kernels are built by the compilers of the machine, which takes a minute for the smallest model.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

from ganscale.config import Config
from ganscale.errors import ConfigError
from ganscale.models import elementwise
from ganscale.models.fused import bias_leaky_relu
from ganscale.training.compilation import kernel_compiler
from tests.conftest import MakeConfig
from tests.support.runs import final_digest, start_ranks, wait_all

R3GAN = {
    "model": {"name": "r3gan", "base_channels": 16, "blocks_per_stage": 1, "z_dim": 16},
    "objective": {"name": "relativistic"},
    "penalty": {"r1": 0.1, "r2": 0.1},
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a folder the user's cache, from here on."""

    def set_cache(name: str) -> Path:
        monkeypatch.setenv("GANSCALE_CACHE", str(tmp_path / name))
        # Whoever compiles in this process sets it; it is reset to what it is here.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        return tmp_path / name

    return set_cache


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_restart_has_the_same_bits_whether_kernels_are_kept_or_lost(
    make_config: MakeConfig, cache: Callable[[str], Path]
) -> None:
    """Of two workers, which share the cache, in bf16, where the last stage is in fp32."""

    def run(name: str, kimg: float) -> tuple[int, str]:
        config = make_config(
            name=name,
            training__compile="on",
            training__precision="bf16",
            training__total_kimg=kimg,
            **R3GAN,
        )
        wait_all(start_ranks(config, 2), timeout=600)
        return final_digest(config)

    folder = cache("first")
    expected = run("whole", 0.16)
    kernels = {*folder.rglob("*.so")}
    assert kernels
    run("resumed", 0.08)
    assert run("resumed", 0.16) == expected
    assert {*folder.rglob("*.so")} == kernels
    folder = cache("second")
    assert run("anew", 0.16) == expected
    assert [*folder.rglob("*.so")]


@pytest.mark.parametrize("chosen", ["", "tmp/torchinductor_me", "tmp/mine"])
def test_kernels_are_kept_in_the_users_cache_unless_the_user_says_where(
    chosen: str, cache: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache("users")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    if chosen:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / chosen))
    kernel_compiler(Config(training={"compile": "on"}), torch.device("cpu"))
    expected = tmp_path / chosen if chosen == "tmp/mine" else folder / "kernels"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(expected)
    assert expected.is_dir()


def test_a_cache_that_cannot_be_written_is_refused(
    cache: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache("unused")
    monkeypatch.setenv("GANSCALE_CACHE", "/dev/null/x")
    with pytest.raises(ConfigError, match=r"training.compile=on, .*/dev/null/x"):
        kernel_compiler(Config(training={"compile": "on"}), torch.device("cpu"))


def test_auto_compiles_where_it_pays() -> None:
    def compiles(model: str, device: str, mode: str) -> bool:
        config = Config(model={"name": model}, training={"compile": mode})
        compiler = kernel_compiler(config, torch.device(device))
        return isinstance(compiler, elementwise.KernelCompiler)

    found = {
        (model, device): [compiles(model, device, mode) for mode in ("auto", "on", "off")]
        for model in ("r3gan", "stylegan2", "dcgan", "sngan")
        for device in ("cpu", "cuda")
    }
    always_auto = {("r3gan", "cuda"), ("stylegan2", "cuda")}
    assert found == {case: [case in always_auto, True, False] for case in found}


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_without_a_compiler_there_is_one_warning_or_an_error(
    mode: str, cache: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache("empty")
    monkeypatch.setattr(elementwise, "_kernels", {})
    # What auto does where it compiles, though this is a CPU.
    monkeypatch.setattr("ganscale.training.compilation._LIMITED_BY_MEMORY", ("r3gan",))
    config = Config(model={"name": "r3gan"}, training={"compile": mode})
    device = torch.device("cuda" if mode == "auto" else "cpu")
    compiler = kernel_compiler(config, device)
    x = torch.tensor([[-1.0, 2.0]])
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), compiler, torch.no_grad():
        if mode == "on":
            with pytest.raises(ConfigError, match=r"training.compile=on, .*training.compile=off"):
                bias_leaky_relu(x, None, 0.5)
            return
        with pytest.warns(UserWarning, match=r"could not be compiled.*training.compile=off"):
            assert bias_leaky_relu(x, None, 0.5).tolist() == [[-0.5, 2.0]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert bias_leaky_relu(x, None, 0.25).tolist() == [[-0.25, 2.0]]
