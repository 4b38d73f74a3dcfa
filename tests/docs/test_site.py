"""The site builds without a warning, and its reference leaves nothing out.

What is in the reference is read from the inventory of the built site, which other sites link by.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from ganscale_reference import commands
from sphinx.util.inventory import InventoryFile

import ganscale
from ganscale.config import field_names, preset_names
from ganscale.config.sweep import Sweep, SweepFile
from tests.conftest import Verb
from tests.support.documentation import DOCS, ROOT

BUILD = ("-W", "--keep-going", "-n", "-q", "-b", "html", "docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Warnings are errors, and so are references that lead nowhere."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *BUILD, str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""
    return folder


@pytest.fixture(scope="module")
def inventory(site: Path) -> dict[str, set[str]]:
    """The names in the reference, by kind."""
    data = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    return {kind: set(names) for kind, names in data.items()}


def test_the_script_builds_as_the_test_does() -> None:
    assert f"python -m sphinx {' '.join(BUILD)} " in (ROOT / "scripts" / "docs.sh").read_text()


def test_every_field_of_the_configuration_is_in_the_reference(
    inventory: dict[str, set[str]],
) -> None:
    fields = {name for name in inventory["std:confval"] if not name.startswith("sweep: ")}
    assert fields == set(field_names())


def test_every_field_of_a_sweep_is_in_the_reference(inventory: dict[str, set[str]]) -> None:
    assert {f"sweep: {name}" for name in SweepFile.model_fields} - inventory["std:confval"] == {
        "sweep: scheduler"  # whose forms have sections of their own
    }
    assert {"sweep: asha: grace_kimg", "sweep: pbt: interval_kimg"} <= inventory["std:confval"]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("training.batch_size", ("whole number, at least 1", "128", "over all workers")),
        ("optimizer.beta2", ("number or schedule, at least 0, at most 0.999999", "0.999")),
        ("optimizer.lr_discriminator", ("number or schedule, greater than 0, or", "null")),
        ("launch.num_workers", ("list of 2", "at least 1", "resumed")),
        ("model.z_dim", ("(dcgan)", "512", "(stylegan2)", "Size of the latent.")),
        ("method.labels", ("4000", "Only with", "semi-supervised")),
    ],
)
def test_a_field_is_described_with_type_bounds_default_and_sentence(
    site: Path, name: str, texts: tuple[str, ...]
) -> None:
    page = (site / "reference" / "configuration.html").read_text()
    _, found, rest = page.partition(f'id="confval-{name}"')
    assert found
    entry = rest.split('class="std confval"')[0]
    for text in texts:
        assert text in entry, text


def test_every_argument_and_option_of_every_verb_is_in_the_reference(
    site: Path, inventory: dict[str, set[str]]
) -> None:
    verbs = list(commands())
    assert len(verbs) > 30
    documented: set[str] = set()
    for verb in verbs:
        for parameter in verb.parameters:
            is_option = parameter.param_type_name == "option"
            names = parameter.opts if is_option else [parameter.metavar or parameter.name.upper()]
            documented |= {f"{verb.name.replace(' ', '-')}.{name}" for name in names}
    assert inventory["std:cmdoption"] == documented
    page = (site / "reference" / "command-line.html").read_text()
    for verb in verbs:
        assert f"{verb.name}</span></code>" in page.replace('</span> <span class="pre">', " ")


def test_every_public_name_is_in_the_reference(inventory: dict[str, set[str]]) -> None:
    kinds = ("py:function", "py:class", "py:exception")
    documented = set().union(*(inventory[kind] for kind in kinds))
    assert {f"ganscale.{name}" for name in ganscale.__all__} - documented == {
        "ganscale.__version__"
    }


def test_every_preset_is_in_the_table(site: Path, verb: Verb) -> None:
    page = (site / "presets.html").read_text()
    code, out, _ = verb("presets")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["preset", *preset_names()]
    assert all(f'<span class="pre">{name}</span>' in page for name in preset_names())
    (row,) = [line for line in out.splitlines() if line.startswith("sngan-cifar10")]
    # The published recipe: hinge, five discriminator steps of batch 64, 50,000 generator steps.
    assert row.split() == [
        "sngan-cifar10",
        "sngan",
        "32",
        "-",
        "gan:",
        "hinge",
        "5",
        "x",
        "64",
        "16,000",
    ]


@pytest.mark.parametrize("path", sorted((DOCS / "sweeps").iterdir()), ids=lambda path: path.name)
def test_the_sweeps_of_the_documentation_are_valid(path: Path) -> None:
    assert Sweep.load(path).trials()


def luminance(colour: str) -> float:
    """The relative luminance of `#rrggbb` (WCAG 2.1)."""
    values = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, 1 to 21 (WCAG 2.1)."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("path", sorted(DOCS.glob("_static/*.svg")), ids=lambda path: path.name)
def test_diagrams_are_legible_on_light_and_dark_pages(path: Path) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    groups = ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}g")
    num_groups = 0
    for group in groups:
        tags = {element.tag.rpartition("}")[2] for element in group}
        colour = group.get("stroke") or group.get("fill") or ""
        num_groups += 1
        if tags == {"rect"}:  # with white text in them
            assert contrast(colour, "#ffffff") > 4.5
        elif colour != "#ffffff":  # lines and labels on the page itself
            assert contrast(colour, "#ffffff") > 3.9
            assert contrast(colour, "#131416") > 3.9
    assert num_groups > 4
