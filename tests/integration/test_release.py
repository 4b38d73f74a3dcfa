"""What is released: a wheel and a source archive that have all files and need no clone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import ganscale

ROOT = Path(__file__).parents[2]
PACKAGE = Path(ganscale.__file__).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(ROOT)]
    subprocess.run([*command, "--wheel-dir", str(folder)], check=True)
    (path,) = folder.iterdir()
    return path


def test_the_wheel_has_every_file_of_the_package_and_is_small(wheel: Path) -> None:
    assert wheel.name == f"ganscale-{ganscale.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if name.startswith("ganscale/")}
        metadata = file.read(f"ganscale-{ganscale.__version__}.dist-info/METADATA").decode()
    there = (path for path in PACKAGE.rglob("*") if path.is_file())
    expected = {p.relative_to(PACKAGE.parent).as_posix() for p in there if p.suffix != ".pyc"}
    assert names == expected
    assert "ganscale/py.typed" in names
    assert wheel.stat().st_size < 12e6
    assert "Provides-Extra: all" in metadata
    assert "Classifier: Typing :: Typed" in metadata


@pytest.mark.slow
def test_the_wheel_works_outside_the_clone(
    wheel: Path, procedural_shards: Path, tmp_path: Path
) -> None:
    """In a folder of its own before the environment's packages, as another user has it."""
    place = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--target", str(place), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(place)}

    def call(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "ganscale", *arguments],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    where = "import ganscale; print(ganscale.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(place / "ganscale" / "__init__.py")
    assert call("--version").strip() == f"ganscale {ganscale.__version__}"
    assert "dcgan-cifar10" in call("presets")
    call(
        *("train", "--config", "quickstart", f"data.shards={procedural_shards}", "name=first"),
        *("launch.backend=inprocess", "launch.num_workers=1", "training.total_kimg=0.128"),
        *("model.base_channels=8", "samples.num_images=4", "evaluation.every_kimg=0"),
    )
    call("sample", "runs/first", "--num", "4", "--out", "grid.png")
    assert (tmp_path / "grid.png").is_file()
    assert "html" in (call("report", "runs/first") or "")
    assert (tmp_path / "runs/first/report.html").stat().st_size < 3e6


def test_the_source_archive_has_what_builds_and_tests_it(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "scripts/test.sh"}
    assert {*wanted, "ganscale/py.typed", "tests/conftest.py", "docs/index.md"} <= names
    assert not any(name.startswith(("runs/", "data/", ".venv/")) for name in names)


def test_the_version_is_the_same_everywhere() -> None:
    version = ganscale.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## ([0-9.]+)$", changes, re.MULTILINE)[1] == version  # type: ignore[index]
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
