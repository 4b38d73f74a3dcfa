"""A trained generator as users of the package hold it: loaded, called, saved, uploaded, shown.

`SampleableGenerator` draws the images; here are the places that a generator comes from and goes to,
and the forms that its images have in Python.
"""

from __future__ import annotations

import base64
import html
import io
import json
import operator
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, Self, SupportsIndex, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ganscale import __version__
from ganscale.atomic_files import write_text
from ganscale.data.values import PIXELS, ValueRange
from ganscale.errors import ConfigError
from ganscale.generation import hub
from ganscale.generation.latent_sampler import LatentSampler
from ganscale.generation.model_card import (
    card_text,
    evaluation_summary,
    frechet_distance_of,
    hub_header,
    recorded_evaluation,
    usage_of,
)
from ganscale.generation.pictures import as_pictures, as_pillow, make_grid
from ganscale.generation.sampler import SampleableGenerator
from ganscale.generation.snapshot import (
    FOLDER_FILE,
    load_generator,
    save_generator,
    snapshot_file,
)
from ganscale.run_directory import RunDirectory

OutputType = Literal["pil", "pt", "np"]
ClassLabels = SupportsIndex | str | Sequence[SupportsIndex | str] | None

_NUM_SHOWN = 16
_SHOWN_COLUMNS = 8
_MAX_CLASSES = 10


class _Evaluated(Protocol):
    """What `ganscale.evaluate` returns."""

    def to_json(self) -> dict[str, Any]: ...


class ImageList(list[Image.Image]):
    """A list of Pillow images that a notebook shows as one grid. All of them have one size."""

    def grid(self, columns: int | None = None) -> Image.Image:
        """The images as one picture, row by row; nearly square unless `columns` says otherwise.

        Raises `ValueError` for an empty list.
        """
        if not self:
            raise ValueError("expected at least one image")
        pixels = [np.atleast_3d(np.array(image)) for image in self]
        images = torch.from_numpy(np.stack(pixels)).movedim(-1, 1)
        return as_pillow(make_grid(images, columns=columns))

    def _repr_png_(self) -> bytes | None:
        return _png(self.grid()) if self else None


class Generator(SampleableGenerator):
    """A trained generator: `Generator.from_pretrained(place)` loads one, calling it draws images.

    In a notebook it shows itself with the images of the seeds 0 to 15.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        spec: dict[str, Any],
        info: dict[str, Any],
        values: ValueRange = PIXELS,
        path: Path | None = None,
    ) -> None:
        super().__init__(model, spec=spec, info=info, values=values)
        self.path = path
        """The file that it was loaded from; None if it was made in memory."""
        self._samplers: dict[float | None, LatentSampler] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: str = "cpu",
    ) -> Self:
        """Load a generator.

        Args:
            source: a `.safetensors` file, the folder of a run (its newest snapshot) or of one of
                its averages such as `runs/mine/snapshots/best`, a folder that `save_pretrained` has
                written, or a model OWNER/NAME of the Hugging Face hub. What exists on this machine
                goes first.
            revision: a branch, tag or commit of the model on the hub.
            token: for private models of the hub; by default the one that you are logged in with.
            device: where images are drawn: `cpu`, `cuda` or `cuda:N`.

        Weights are safetensors: loading executes no stored code. Raises `CheckpointError` when
        there is no generator or it cannot be read, and `ConfigError` where the hub is needed and
        `ganscale[hub]` is not installed.
        """
        path = Path(source).expanduser()
        if not path.exists() and hub.is_repository(str(source)):
            path = hub.download(str(source), revision=revision, token=token)
        file = snapshot_file(path)
        loaded = load_generator(file, device=device)
        return cls(
            loaded.model,
            spec=loaded.info["model"],
            info=loaded.info,
            values=loaded.values,
            path=file,
        )

    @overload
    def __call__(
        self,
        num_images: int = 16,
        *,
        seed: int = 0,
        class_labels: ClassLabels = None,
        truncation: float | None = None,
        output_type: Literal["pil"] = "pil",
    ) -> ImageList: ...

    @overload
    def __call__(
        self,
        num_images: int = 16,
        *,
        seed: int = 0,
        class_labels: ClassLabels = None,
        truncation: float | None = None,
        output_type: Literal["pt"],
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        num_images: int = 16,
        *,
        seed: int = 0,
        class_labels: ClassLabels = None,
        truncation: float | None = None,
        output_type: Literal["np"],
    ) -> NDArray[Any]: ...

    def __call__(
        self,
        num_images: int = 16,
        *,
        seed: int = 0,
        class_labels: ClassLabels = None,
        truncation: float | None = None,
        output_type: OutputType = "pil",
    ) -> ImageList | Tensor | NDArray[Any]:
        """Draw images of the seeds `seed`, `seed` + 1, ...; a seed's image is always the same.

        On one kind of device an image has the same bits whatever it is drawn with, here and by
        `ganscale sample`.

        Args:
            num_images: how many, at least 1.
            seed: of the first image.
            class_labels: one class for all images, or a list with one for each, as numbers or as
                names of `classes`. By default the seed decides the class of its image.
            truncation: less variety for more typical images. For a model with styles w (StyleGAN2)
                the part of w's distance to its mean that is kept, 0 to 1 (Karras et al. 2019, arXiv
                1812.04948, appendix B); for others the largest magnitude of the latent's elements,
                at least 0.05 (Brock et al. 2019, arXiv 1809.11096, section 3.1).
            output_type: the form of the images.

        Returns:
            With `pil` a list of Pillow images (`ImageList`). With `np` an array (N, H, W, C) of
            uint8, 0 to 255. With `pt` a tensor (N, C, H, W) of float32 in [0, 1] on the CPU, which
            holds the same 8-bit values, divided by 255.

            A generator of arrays of floats, such as spectrograms, gives float32 in the units of its
            training set with `np` and `pt`, and pictures in colours with `pil`.

        Raises `ConfigError`, which is a `ValueError`, for a class that the generator does not know
        and values outside these ranges.
        """
        if output_type not in ("pil", "pt", "np"):
            raise ConfigError(f"output_type={output_type!r}: expected pil, pt or np")
        if num_images < 1:
            raise ConfigError(f"num_images={num_images}: expected at least 1")
        labels = self._class_numbers(class_labels, num_images)
        seeds = list(range(seed, seed + num_images))
        images = self._sampler(truncation).sample_seeds(seeds, label=labels)
        if output_type == "pil":
            return ImageList(as_pillow(image) for image in as_pictures(images, self.values))
        if output_type == "np":
            array: NDArray[Any] = images.movedim(1, -1).contiguous().numpy()
            return array
        return images.float() / 255 if self.values.dtype == "uint8" else images

    def to(self, device: str | torch.device) -> Self:
        """Move the network to a device, on which images are then drawn; returns itself."""
        self.model.to(device)
        self._samplers.clear()  # which hold means of w on the device before
        return self

    @property
    def num_parameters(self) -> int:
        """The number of weights of the network."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def nimg(self) -> int:
        """How many real images it was trained on."""
        return int(self.info["nimg"])

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """The metrics that are known of it, `metrics`, and how they were measured, `protocol`.

        They are from its file, or from the run whose folder the file is in. Empty if there are
        none.
        """
        about: Mapping[str, Any] = self.info.get("about", {})
        if "metrics" in about:
            return {name: about[name] for name in ("metrics", "protocol") if name in about}
        return {} if self.path is None else recorded_evaluation(self.path, self.nimg)

    def about(self, licence: str | None, evaluation: _Evaluated | None = None) -> dict[str, Any]:
        """What is written with its weights and onto its card beside the description.

        That is what its own file says, its figures, the licence, and the date.
        """
        about = dict(self.info.get("about", {}))
        about |= self.evaluation if evaluation is None else evaluation_summary(evaluation.to_json())
        if licence is not None:
            about["licence"] = licence
        about["exported"] = f"{date.today().isoformat()} by ganscale {__version__}"
        return about

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        licence: str | None = None,
        evaluation: _Evaluated | None = None,
    ) -> Path:
        """Write it as a folder that `from_pretrained` loads and the Hugging Face hub understands.

        Args:
            folder: is made if it does not exist: `model.safetensors` has the weights in full
                precision and their description, `config.json` the description again, for people
                and the hub, and `README.md` is a model card.
            licence: of the weights, such as CC0-1.0.
            evaluation: what `ganscale.evaluate` has returned for this generator, for the card. By
                default the card has the figures that the run has recorded.

        Returns:
            The folder. Images of the loaded generator are bit-identical. Encoders and classifiers
            of the snapshot are left out.

        Raises `ConfigError` if the folder is that of a run.
        """
        folder = Path(folder).expanduser()
        if RunDirectory(folder).is_run:
            raise ConfigError(f"{folder} is the folder of a run: choose another one")
        self._save(folder, str(folder), self.about(licence, evaluation))
        return folder

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = "Upload a generator",
        licence: str | None = None,
        evaluation: _Evaluated | None = None,
    ) -> str:
        """Upload it to the Hugging Face hub, as `save_pretrained` would write it.

        Args:
            repository: OWNER/NAME; it is created if it does not exist.
            private: whether a new repository is private; by default as the owner has chosen.
            revision: the branch to commit to.
            token: by default the one that you are logged in with.
            commit_message: of the commit.
            licence, evaluation: as for `save_pretrained`.

        Returns:
            The address of the model.

        It needs `pip install 'ganscale[hub]'`. Raises `ConfigError` without, for a name that is
        none of a model, and where the hub refuses.
        """
        if not hub.is_repository(repository):
            raise ConfigError(f"{repository}: expected OWNER/NAME")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / repository.partition("/")[2]
            self._save(folder, repository, self.about(licence, evaluation))
            return hub.upload(
                folder,
                repository,
                private=private,
                revision=revision,
                token=token,
                commit_message=commit_message,
            )

    def __repr__(self) -> str:
        return f"Generator({', '.join(self._facts())})"

    def _repr_html_(self) -> str:
        images = self(_NUM_SHOWN).grid(columns=_SHOWN_COLUMNS)
        data = base64.b64encode(_png(images)).decode()
        return (
            f"<p><code>{html.escape(repr(self))}</code></p>"
            f'<img src="data:image/png;base64,{data}" alt="images of the seeds 0 to 15">'
        )

    def _facts(self) -> Iterable[str]:
        spec = self.info["model"]
        yield str(spec["name"])
        yield f"{self.num_parameters / 1e6:.2f} million parameters"
        yield f"{spec['img_channels']}x{self.resolution}x{self.resolution}"
        if self.num_classes:
            names = self.classes[:_MAX_CLASSES]
            more = " ..." if len(self.classes) > _MAX_CLASSES else ""
            yield f"{self.num_classes} classes" + (f" ({' '.join(names)}{more})" if names else "")
        yield f"trained on {self.nimg / 1000:,.6g} kimg"
        if (distance := frechet_distance_of(self.evaluation)) is not None:
            yield "{} {:.4g}".format(*distance)

    def _sampler(self, truncation: float | None) -> LatentSampler:
        # Kept, since a mean of w takes 1,024 latents through the mapping network for each class.
        if truncation not in self._samplers:
            self._samplers[truncation] = LatentSampler(self, truncation_psi=truncation)
        return self._samplers[truncation]

    def _class_numbers(self, labels: ClassLabels, num_images: int) -> int | list[int] | None:
        if labels is None:
            return None
        # An int of Python's or numpy's, or a name.
        if isinstance(labels, str) or not isinstance(labels, Iterable):
            return self._class_number(labels)
        numbers = [self._class_number(label) for label in labels]
        if len(numbers) != num_images:
            raise ConfigError(f"class_labels has {len(numbers)} labels for {num_images} images")
        return numbers

    def _class_number(self, label: SupportsIndex | str) -> int:
        if not isinstance(label, str):
            try:
                return operator.index(label)
            except TypeError:
                raise ConfigError(f"class {label!r}: expected a whole number or a name") from None
        if label not in self.classes:
            known = ", ".join(self.classes) or "no names of classes"
            raise ConfigError(f"class {label!r}: this generator has {known}")
        return self.classes.index(label)

    def _save(self, folder: Path, source: str, about: Mapping[str, Any]) -> None:
        """Write weights, description and card; the card says that it is loaded from `source`."""
        num_bytes = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        # Before anything is written: the run may have a configuration that cannot be read.
        card = card_text(
            folder.resolve().name,
            self,
            self.path,
            about=about,
            file=f"{num_bytes / 1e6:.2f} MB in full precision",
            usage=usage_of(source),
        )
        info = save_generator(folder / FOLDER_FILE, self, about)
        write_text(folder / "config.json", json.dumps(info, indent=2) + "\n")
        write_text(folder / "README.md", hub_header(self, about.get("licence")) + card)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
