"""Which files of a tree are images to train on, and of which class: decided from paths alone.

People keep images in class folders, in no folders, under one top folder, beside notes and backups,
with a training and a test part, or with labels in a `dataset.json` (StyleGAN's tools). What can be
read in one way only is read so. What can be read in two ways, or would lose more than a few images,
is refused with the readings and the option that chooses between them. Whatever else is left out is
counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

from ganscale.data.file_tree import FileTree
from ganscale.data.labels import check_labels, numbered_classes
from ganscale.data.tally import Tally
from ganscale.errors import DataError

Split = Literal["train", "test"]
Layout = Literal["auto", "top-folders", "leaf-folders", "flat", "tars"]
"""How classes are read from folders.

`top-folders`: the class of an image is the first folder on its path, at whatever depth it lies
(torchvision's ImageFolder). `leaf-folders`: the class is the path of the folder that it lies in.
`flat`: images at any depth, without classes. `tars`: WebDataset tars. `auto`: the one of these that
fits, if only one does.
"""
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_BY_FOLDER: tuple[Layout, Layout] = ("top-folders", "leaf-folders")

IMAGE_SUFFIXES = (
    "png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "dib", "gif", "tif", "tiff",
    "ppm", "pgm", "pbm", "pnm", "tga", "jp2", "j2k", "jpx", "avif", "qoi", "sgi", "pcx", "dds",
)  # fmt: skip
"""Of files that Pillow decodes."""
ARRAY_SUFFIX = "npy"
_OTHER_IMAGE_SUFFIXES = (
    "heic", "heif", "jxl", "svg", "psd", "exr", "hdr", "dng", "raw", "cr2", "cr3", "nef", "arw",
)  # fmt: skip
"""Of images that Pillow does not decode: losing them is losing images."""
_ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")
_SYSTEM_FILES = ("thumbs.db", "desktop.ini", "ehthumbs.db")
_SPLIT_FOLDERS = ("train", "training", "test", "testing", "val", "valid", "validation")
_DATASET_JSON = "dataset.json"
_FEW_IMAGES = 5
"""So many images may be left out, with a count; more are refused.

A stray picture beside class folders is common; a sixth one is more likely a set read wrongly.
"""
_NUM_SHOWN = 4


@dataclass(frozen=True)
class Arrangement:
    """The images of a tree, in the order of their paths, and what was left out."""

    members: tuple[str, ...]
    labels: tuple[int, ...]
    """Class of each image; -1 where there are no classes."""
    classes: tuple[str, ...]
    """Names of the classes, by label."""
    are_arrays: bool
    """Whether the members are arrays of floats (npy)."""
    left_out: Tally


def arrange(tree: FileTree, split: Split, layout: Layout) -> Arrangement:
    """The images of one part of a tree.

    Args:
        tree: of a folder or archive.
        split: which part, where the tree has a training and a test part.
        layout: how classes are read; `auto` refuses what can be read in two ways.

    Raises:
        DataError: there are no images, no such part, two ways to read the tree, or images that
            would be left out.
    """
    left_out = Tally() + tree.left_out
    visible = []
    for member in tree.members:
        if is_hidden(member):
            left_out.add("hidden or system files", member)
        else:
            visible.append(member)
    trained = trained_on(visible)
    if not trained:
        raise DataError(f"{tree.path}: {_no_images(visible)}")
    # After the hidden files are gone and before anything else: what an archiver added must not look
    # like a class, and all other decisions are about one part of the set.
    prefix = part_of(tree, trained, split, layout)
    used = {*trained, f"{prefix}{_DATASET_JSON}" if layout == "auto" else ""}
    for member in visible:
        if member not in used:
            left_out.add(_why_not_an_image(member), member)
        elif not member.startswith(prefix):
            left_out.add(_OTHER_SPLITS if _is_split(member, prefix) else _OUTSIDE, member)
    # Sorted, as the order of a source decides its shards, and file systems list in any order.
    inside = sorted(member for member in trained if member.startswith(prefix))
    if layout == "auto":
        _refuse_archives(tree, visible, len(inside))
    arrangement = _Part(tree, prefix, inside, left_out).read(layout)
    _check_losses(tree, arrangement)
    return arrangement


def is_hidden(member: str) -> bool:
    """Whether a path is of a file that operating systems and archivers put beside others."""
    parts = member.split("/")
    # "." itself is a folder that archivers write before every name.
    hidden = any(part.startswith((".", "__MACOSX")) and part != "." for part in parts)
    return hidden or parts[-1].lower() in _SYSTEM_FILES


@dataclass(frozen=True)
class _Part:
    """The images of a tree below `prefix`."""

    tree: FileTree
    prefix: str
    members: list[str]
    left_out: Tally

    def read(self, layout: Layout) -> Arrangement:
        if layout == "auto":
            if f"{self.prefix}{_DATASET_JSON}" in self.tree.members:
                return self._by_dataset_json()
            layout = self._only_layout()
        if layout == "flat":
            return self._arranged(self.members, [-1] * len(self.members), ())
        in_folders = [member for member in self.members if "/" in self._inner(member)]
        for member in self.members:
            if "/" not in self._inner(member):
                self.left_out.add("images beside the class folders", member)
        if not in_folders:
            raise DataError(
                f"{self._place}: no image lies in a folder, so there are no classes to read by "
                f"--layout {layout}; --layout flat takes images without classes"
            )
        return self._by_folder(in_folders, layout)

    def _by_folder(self, members: list[str], layout: Layout) -> Arrangement:
        names = [self._folder(member, layout) for member in members]
        classes = sorted(set(names))
        numbers = {name: label for label, name in enumerate(classes)}
        # A class folder without images is reported, as it may be a class whose files were
        # forgotten.
        used = {PurePosixPath(member).parent for member in members}
        used |= {parent for folder in used for parent in folder.parents}
        for folder in self.tree.folders:
            is_inside = folder.startswith(self.prefix) and not is_hidden(folder)
            if is_inside and PurePosixPath(folder) not in used:
                self.left_out.add("folders without images", folder)
        return self._arranged(members, [numbers[name] for name in names], classes)

    def _only_layout(self) -> Layout:
        """The layout that the images have; `DataError` where more than one fits."""
        # Only CLASS/NAME and NAME can be read in one way. Deeper paths may have classes on top or
        # at the bottom, and guessing wrong trains for days on the wrong labels.
        depths = Counter(self._inner(member).count("/") for member in self.members)
        loose, in_classes = depths[0], depths[1]
        if loose == len(self.members):
            return "flat"
        if in_classes + loose < len(self.members):
            deep = next(m for m in self.members if self._inner(m).count("/") > 1)
            raise self._ambiguous(f"some images lie deeper than CLASS/NAME ({self._inner(deep)})")
        if loose > _FEW_IMAGES:
            raise self._ambiguous(f"{loose} images lie beside class folders")
        return "top-folders"

    def _ambiguous(self, problem: str) -> DataError:
        in_folders = [member for member in self.members if "/" in self._inner(member)]
        lost = len(self.members) - len(in_folders)
        without = f", without {lost} images" if lost else ""
        top, leaf = (
            _counted(sorted({self._folder(member, layout) for member in in_folders}))
            for layout in _BY_FOLDER
        )
        readings = [f"--layout top-folders: {top}{without}"]
        if leaf != top:
            readings.append(f"--layout leaf-folders: {leaf}{without}")
        readings.append(f"--layout flat: all {len(self.members)} images, no classes")
        return DataError(
            f"{self._place}: {problem}, which can be read in more than one way. Choose when "
            f"building with ganscale shards build: {'; '.join(readings)}"
        )

    def _by_dataset_json(self) -> Arrangement:
        place = self.tree.name(f"{self.prefix}{_DATASET_JSON}")
        try:
            content = json.loads(self.tree.read(f"{self.prefix}{_DATASET_JSON}"))
            pairs = content["labels"]
            listed = None if pairs is None else {str(name): label for name, label in pairs}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{place} is not a list of labels as StyleGAN's tools write it "
                f"({type(error).__name__}: {error}); --layout top-folders or flat ignores it"
            ) from None
        if listed is None:
            return self._arranged(self.members, [-1] * len(self.members), ())
        labels: list[Any] = [listed.get(self._inner(member)) for member in self.members]
        for member, label in zip(self.members, labels, strict=True):
            # Not isinstance, as JSON's true is an int to Python; and StyleGAN's tools may write a
            # vector, which this cannot train on.
            if label is not None and (type(label) is not int or label < 0):
                raise DataError(
                    f"{place}: the label of {member} is {label!r}, not a class number from 0; "
                    "--layout top-folders or flat ignores the file"
                )
        numbers = [-1 if label is None else label for label in labels]
        check_labels(numbers, place, lambda index: self.members[index])
        absent = set(listed).difference(self._inner(member) for member in self.members)
        if absent:
            reason = f"labels in {_DATASET_JSON} without an image"
            self.left_out.add(reason, min(absent), len(absent))
        return self._arranged(self.members, numbers, numbered_classes(numbers))

    def _arranged(
        self, members: Sequence[str], labels: Sequence[int], classes: Sequence[str]
    ) -> Arrangement:
        return Arrangement(
            tuple(members),
            tuple(labels),
            tuple(classes),
            _suffix(members[0]) == ARRAY_SUFFIX,
            self.left_out,
        )

    def _inner(self, member: str) -> str:
        return member.removeprefix(self.prefix)

    def _folder(self, member: str, layout: Layout) -> str:
        folder, _, _ = self._inner(member).rpartition("/")
        return folder if layout == "leaf-folders" else folder.split("/")[0]

    @property
    def _place(self) -> str:
        return f"{self.tree.path}/{self.prefix}".rstrip("/")


def part_of(
    tree: FileTree, members: Sequence[str], split: Split, layout: Layout, *, min_depth: int = 1
) -> str:
    """The folder that holds the class folders or images: "" or a path that ends with "/".

    A single top folder is passed through if `members` lie at least `min_depth` folders below it
    (archives are often of one folder), and the part named by `split` is taken where all folders are
    parts. Raises `DataError` if there is no such part, or a folder may be a part or a class.
    """
    prefix, inside, split_taken = "", list(members), False
    while True:
        inner = [member.removeprefix(prefix) for member in inside]
        tops = sorted({name.split("/")[0] for name in inner if "/" in name})
        has_loose = any("/" not in name for name in inner)
        parts = [top for top in tops if top.lower() in _SPLIT_FOLDERS]
        place = f"{tree.path}/{prefix}".rstrip("/")
        # All folders are parts (train, test, ...): the one asked for is taken, once only, since a
        # class may be called "test" as well.
        if not split_taken and tops and parts == tops:
            wanted = [top for top in tops if top.lower().startswith(split)]
            if len(wanted) != 1:
                what = f"both {' and '.join(wanted)}" if wanted else f"no {split}"
                raise DataError(f"{place} has {' and '.join(tops)}, but {what}")
            prefix, split_taken = f"{prefix}{wanted[0]}/", True
        elif (
            not split_taken and layout == "auto" and {p.lower() for p in parts} & {"train", "test"}
        ):
            named = next(p for p in parts if p.lower() in ("train", "test"))
            num_inside = sum(name.startswith(f"{named}/") for name in inner)
            raise DataError(
                f"{place}: the folder {named} may be a class or a part of the set, since there are "
                f"others ({_shown([t for t in tops if t != named])}). Choose when building with "
                f"ganscale shards build: --layout top-folders takes {named} as one of "
                f"{_counted(tops)}; --source {place}/{named} takes its {num_inside} images alone"
            )
        elif (
            len(tops) == 1 and not has_loose and any(name.count("/") > min_depth for name in inner)
        ):
            prefix = f"{prefix}{tops[0]}/"
        else:
            return prefix
        inside = [member for member in inside if member.startswith(prefix)]


def trained_on(members: Sequence[str]) -> list[str]:
    """The files that are trained on: the images; the arrays where there are no images."""
    # Images first, because masks and embeddings often lie beside them as arrays.
    for suffixes in (IMAGE_SUFFIXES, (ARRAY_SUFFIX,)):
        trained = [member for member in members if _suffix(member) in suffixes]
        if trained:
            return trained
    return []


def archives_of(members: Sequence[str]) -> list[str]:
    """The tars and zips among some files."""
    return [member for member in members if member.lower().endswith(_ARCHIVE_SUFFIXES)]


def _refuse_archives(tree: FileTree, visible: Sequence[str], num_images: int) -> None:
    """An archive beside images may be a backup of them, or the set itself."""
    archives = archives_of(visible)
    if archives:
        raise DataError(
            f"{tree.path} has images ({num_images}) and archives ({len(archives)}, such as "
            f"{archives[0]}): either may be the set. Choose when building with ganscale "
            "shards build: --layout top-folders or flat takes the images, --layout tars the "
            f"WebDataset tars, --source {tree.path / archives[0]} that archive alone"
        )


_OUTSIDE = "images beside the folder that was read"
_OTHER_SPLITS = "images of other splits"
_UNREADABLE = "images of formats that cannot be decoded"


def _why_not_an_image(member: str) -> str:
    if _suffix(member) in _OTHER_IMAGE_SUFFIXES:
        return _UNREADABLE
    if archives_of([member]):
        return "archives"
    return "files that are not images"


def _no_images(visible: Sequence[str]) -> str:
    suffixes = Counter(_suffix(member) or "none" for member in visible)
    seen = ", ".join(f"{suffix} ({num})" for suffix, num in suffixes.most_common(_NUM_SHOWN))
    return (
        f"no images found; suffixes that are there: {seen or 'no files'}; suffixes of images: "
        f"{', '.join(IMAGE_SUFFIXES)}; of arrays: {ARRAY_SUFFIX}"
    )


_LOSSES = (_UNREADABLE, _OUTSIDE, "links to nothing")


def _check_losses(tree: FileTree, arrangement: Arrangement) -> None:
    """Refuse to leave out more than a few images unless an option asked for it."""
    lost = Tally(
        {reason: entry for reason, entry in arrangement.left_out.items() if reason in _LOSSES}
    )
    num = sum(count for _, (count, _) in lost.items())
    if num > _FEW_IMAGES:
        raise DataError(
            f"{tree.path}: {num} images beside {len(arrangement.members)} others would be left out "
            f"({lost}). Convert them, or move them out of the folder"
        )


def _is_split(member: str, prefix: str) -> bool:
    """Whether a member lies in another part than the one that was read."""
    parts = prefix.rstrip("/").split("/")
    other = member.split("/")
    differing = next((b for a, b in zip(parts, other, strict=False) if a != b), "")
    return differing.lower() in _SPLIT_FOLDERS and len(other) > 1


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} class{'es' if len(names) != 1 else ''} ({_shown(names)})"


def _shown(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more


def _suffix(member: str) -> str:
    name = member.rpartition("/")[2].lower()
    return name.rpartition(".")[2] if "." in name else ""
