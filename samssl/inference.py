"""A model bundle, or several together, on a scan that is in no slice store.

    from samssl import load_bundle
    prediction = load_bundle("runs/mine/finetune/bundle").predict("scan.nii.gz")
    prediction.mask, prediction.affine, prediction.names

Slices, intensities, resizing and decisions are those of `evaluate`: one bundle without flips predicts what
`evaluate` scored, voxel by voxel. Several members (bundles, and flips of each) decide by the mean of their
logits, as nnU-Net has it for its folds (doi:10.1038/s41592-020-01008-z); their entropy is that of the mean of
their probabilities.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from scipy import ndimage
from torch import Tensor

from samssl.bundle import Bundle, BundleError, load_segmenter, read_bundle
from samssl.config import Count, NonNegative, UserError, config
from samssl.data.classes import Classes, ClassMap, run_classes
from samssl.data.entries import known_modality
from samssl.data.familiarity import unlike
from samssl.data.inputs import square_images
from samssl.data.pointed import PointedObject, Pointing, pointed_objects
from samssl.data.readers.geometry import Grid, turned_onto
from samssl.data.resize import fitted_shape
from samssl.data.scans import Axis, Modality, Scan, read_grid, scan_of
from samssl.data.single import ScanSlices, scan_slices
from samssl.data.sources import DataSource
from samssl.interactive import Asking, pointed_answers
from samssl.predict import native_logits

Flip = Literal["horizontal", "vertical"]
_DIMENSION: dict[Flip, int] = {"horizontal": 3, "vertical": 2}


@config
class InferenceConfig:
    """How scans are read and segmented."""

    modality: Modality | None = None
    """MR, CT, XR, US or PT; null: as the file says, else the training data's."""
    axis: Axis | None = None
    """Axis across which volumes are cut into slices; null: that of the training data."""
    volume: Count | None = None
    """Which one, from 0, of the several volumes or pages of a file."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass; auto: bf16 on a GPU, fp32 on a CPU. `evaluate` has fp32."""
    flips: tuple[Flip, ...] = ()
    """Slices are also segmented mirrored, by each of these and by both. Leave `horizontal` out where left and
    right are different classes."""
    largest_component: bool = False
    """Of each class only the largest connected part is kept."""
    min_component_ml: NonNegative = 0.0
    """Connected parts of a class that are smaller become background."""


@dataclass(frozen=True)
class Prediction:
    """What was found in a scan, on the voxels of its file and in their order."""

    mask: Shaped[np.ndarray, "..."]
    """Class ids [I, J, K], or regions [regions, I, J, K] of booleans where classes overlap."""
    affine: Float[np.ndarray, "4 4"]
    """From the index of a voxel to RAS mm, as the file has it."""
    classes: Classes
    """What is told apart."""
    entropy: Float[np.ndarray, "I J K"]
    """Of each voxel's probabilities, from 0 (sure) to 1 (no idea); of regions the highest."""
    uncertainty: float | None
    """Mean entropy where any class was found; None where none was."""
    disagreement: float | None
    """Share of the voxels that any member gives to a class of which another member says otherwise."""
    warnings: tuple[str, ...]
    """How the scan looks unlike the training data."""

    @property
    def names(self) -> dict[int, str]:
        """Class id to name; regions are in this order."""
        return self.classes.names

    def inside(self, class_id: int) -> Bool[np.ndarray, "I J K"]:
        """True inside one class."""
        return self.classes.mask_of(self.mask, class_id)

    def volume_ml(self, class_id: int) -> float:
        """Of one class."""
        return float(self.inside(class_id).sum() * abs(np.linalg.det(self.affine[:3, :3])) / 1000)


@dataclass(frozen=True)
class _Found:
    """What the members found in a scan, in slices."""

    classes: ClassMap
    entropy: Float[np.ndarray, "Z H W"]
    disagreement: float | None


class LoadedBundle:
    """The segmenters of one or more bundles of the same classes, ready to predict; made by `load_bundle`."""

    def __init__(self, paths: Sequence[Path], base: Path | None = None, *, prompted: bool = False) -> None:
        """Load the bundles; `base` says where base weights are, if not where they were.

        With `prompted` a promptable bundle, which needs a `pointing` at each scan; else those that need none.

        Raises:
            UserError: a bundle cannot be used, is of the other kind, or has other classes than the first.
        """
        self.bundles = [read_bundle(path) for path in paths]
        self.prompted = prompted
        (_check_prompted if prompted else check_members)(paths, self.bundles)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.segmenters: list[Any] = [load_segmenter(path, base).to(self.device) for path in paths]

    @property
    def classes(self) -> Classes:
        """What is told apart, where a pointing does not say otherwise."""
        return self.bundles[0].run_classes

    @property
    def knows_training_data(self) -> bool:
        """Whether it can tell that a scan looks unlike the training data."""
        return self.bundles[0].fingerprint is not None

    def predict(
        self,
        scan: str | Path,
        settings: InferenceConfig = InferenceConfig(),
        *,
        files: Sequence[Path] = (),
        modality: Modality | None = None,
        between: Callable[[], None] = lambda: None,
        pointing: Pointing | None = None,
    ) -> Prediction:
        """Segment the scan of a file, or of the `files` of a DICOM series; `modality` is what the file says.

        `between` is called after every few slices; what it raises ends the prediction.

        Raises:
            UserError: the scan cannot be read, nothing says what modality it is of, or `pointing` is given
                to bundles that need none, left out of one that does, or does not fit the scan.
        """
        path = Path(scan).expanduser()
        grid = read_grid(path, files=files, volume=settings.volume)
        known = self.bundles[0].fingerprint
        chosen = settings.modality or modality or self.default_modality
        axis = settings.axis or _axis(known.axis if known else "auto")
        oriented = scan_of(grid, chosen, path, axis)
        slices = scan_slices(oriented, (known and known.window_hu) or DataSource.window_hu)
        told_apart = pointed_classes(self.bundles[0], pointing) if pointing else self.classes
        objects = self._pointed(pointing, told_apart, grid, oriented)
        if objects:
            found = self._answer(slices, objects, settings, between)
        else:
            found = self._segment(slices, settings, between)
        classes = _cleaned(found.classes, told_apart, oriented, settings)
        turn = _Turn(oriented, grid.array.shape, grid.affine)
        inside = classes.any(axis=0) if told_apart.overlapping else classes > 0
        return Prediction(
            mask=np.stack([turn(region) for region in classes]) if classes.ndim == 4 else turn(classes),
            affine=grid.affine,
            classes=told_apart,
            entropy=turn(found.entropy),
            uncertainty=float(found.entropy[inside].mean()) if inside.any() else None,
            disagreement=found.disagreement,
            warnings=tuple(unlike(known, oriented, slices.values)) if known else (),
        )

    @property
    def default_modality(self) -> Modality:
        """That of the training data.

        Raises:
            UserError: an older bundle does not say it.
        """
        known = self.bundles[0].fingerprint
        modality = known and known_modality(known.modalities[0])
        if not modality:
            raise UserError(
                "The bundle was written by a version that did not note what its training data looked like: "
                "set modality to MR, CT, XR, US or PT."
            )
        return modality

    def _pointed(
        self, pointing: Pointing | None, classes: Classes, grid: Grid, scan: Scan
    ) -> list[PointedObject]:
        if self.prompted != (pointing is not None):
            raise UserError("A promptable bundle needs prompts, and others take none.")
        if pointing is None:
            return []
        if not pointing.pointers:
            raise UserError("No prompt points at anything in this scan.")
        return pointed_objects(pointing, classes.labels, grid, scan)

    @torch.inference_mode()
    def _answer(
        self,
        slices: ScanSlices,
        objects: Sequence[PointedObject],
        settings: InferenceConfig,
        between: Callable[[], None],
    ) -> _Found:
        """Label ids where objects are; where they overlap, of the one that is surest."""
        if settings.flips:
            raise UserError("Prompts say where things are, so that slices are not mirrored: leave flips out.")
        bundle, shape = self.bundles[0], slices.scan.voxels.shape
        largest = max(each.label for each in objects)
        classes = np.zeros(shape, np.uint8 if largest < 256 else np.uint16)
        surest = np.full(shape, -np.inf, np.float32)
        asking = Asking(bundle.model.image_size, bundle.input, 0, self.device)
        with self._precision(settings):
            for each, logits in pointed_answers(self.segmenters[0], slices, objects, asking):
                between()
                values = logits.cpu().numpy()
                classes[each.z][(values > 0) & (values > surest[each.z])] = each.label
                surest[each.z] = np.maximum(surest[each.z], values)
        entropy = _entropy([torch.from_numpy(surest)[:, None]], overlapping=True)
        return _Found(classes, entropy.numpy(), None)

    def _precision(self, settings: InferenceConfig) -> torch.autocast:
        bf16 = settings.precision == "bf16" or (settings.precision == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    @torch.inference_mode()
    def _segment(self, slices: ScanSlices, settings: InferenceConfig, between: Callable[[], None]) -> _Found:
        decided, entropies, differing, touched = [], [], 0, 0
        with self._precision(settings):
            members = [
                self._member(number, slices, flips)
                for number in range(len(self.bundles))
                for flips in _subsets(settings.flips)
            ]
            between()
            for logits in zip(*members, strict=True):
                between()
                decided.append(self.classes.decide(torch.stack(logits).mean(dim=0)).cpu().numpy())
                entropies.append(_entropy(logits, self.classes.overlapping).cpu().numpy())
                differ, touch = _differing([self.classes.decide(each) for each in logits])
                differing, touched = differing + differ, touched + touch
        classes = np.concatenate(decided)
        classes = classes.swapaxes(0, 1) if self.classes.overlapping else classes
        disagreement = differing / touched if len(members) > 1 and touched else None
        return _Found(classes, np.concatenate(entropies), disagreement)

    def _member(self, number: int, slices: ScanSlices, flips: Sequence[Flip]) -> Iterator[Tensor]:
        """Logits on native pixels of one bundle, of slices mirrored and mirrored back."""
        bundle, segmenter = self.bundles[number], self.segmenters[number]
        size, (_, height, width) = bundle.model.image_size, slices.scan.voxels.shape
        rows, columns = fitted_shape(height, width, size)
        dimensions = [_DIMENSION[flip] for flip in flips]

        def logits_of(chosen: Sequence[int]) -> Tensor:
            images = square_images(slices, chosen, size, bundle.input, self.device)
            if flips:  # within what the slice fills: padding stays below and to the right
                images[:, :, :rows, :columns] = images[:, :, :rows, :columns].flip(dimensions)
            return segmenter(images)

        every = range(len(slices.scan.voxels))
        for part in native_logits(logits_of, every, (height, width), size, self.classes.num_outputs):
            yield part.flip(dimensions) if flips else part


@dataclass(frozen=True)
class _Turn:
    """From slices back to the order of the file's own voxels."""

    scan: Scan
    shape: tuple[int, ...]
    affine: Float[np.ndarray, "4 4"]

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return turned_onto(array, self.scan.affine, self.shape, self.affine)


def check_members(paths: Sequence[Path], bundles: Sequence[Bundle]) -> None:
    """Whether bundles can predict, and together.

    Raises:
        BundleError: one takes prompts, or has other classes than the first.
    """
    for path, bundle in zip(paths, bundles, strict=True):
        if bundle.mode == "promptable":
            raise BundleError(
                f"The bundle {path} segments what it is prompted for: give predict its prompts as a file, or "
                "a bundle that was fine-tuned with mode=automatic."
            )
        if bundle.run_classes != bundles[0].run_classes:
            raise BundleError(
                f"The bundle {path} has other classes than {paths[0]}. Bundles that predict together must "
                "have the same."
            )


def _check_prompted(paths: Sequence[Path], bundles: Sequence[Bundle]) -> None:
    if len(bundles) > 1:
        raise BundleError("Bundles that are prompted do not predict together: leave more_bundles out.")
    if bundles[0].mode != "promptable":
        raise BundleError(
            f"The bundle {paths[0]} segments by itself and takes no prompts. Leave them out, or give a "
            "bundle that was fine-tuned with mode=promptable."
        )


def pointed_classes(bundle: Bundle, pointing: Pointing) -> Classes:
    """What pointers may name: each label is a class."""
    labels = bundle.labels if pointing.labels is None else {0: bundle.labels[0], **pointing.labels}
    return run_classes(labels)


def _subsets(flips: Sequence[Flip]) -> list[tuple[Flip, ...]]:
    """No flip, each, and all of them together."""
    return [chosen for count in range(len(flips) + 1) for chosen in combinations(dict.fromkeys(flips), count)]


def _entropy(logits: Sequence[Tensor], overlapping: bool) -> Float[Tensor, "B H W"]:
    """Of the mean of the members' probabilities, as a share of the most that it can be."""
    if overlapping:
        inside = torch.stack([each.sigmoid() for each in logits]).mean(dim=0)
        probabilities = torch.stack([inside, 1 - inside])
        return (torch.special.entr(probabilities).sum(dim=0) / log(2)).amax(dim=1)
    probabilities = torch.stack([each.softmax(dim=1) for each in logits]).mean(dim=0)
    return torch.special.entr(probabilities).sum(dim=1) / log(probabilities.shape[1])


def _differing(decided: Sequence[Tensor]) -> tuple[int, int]:
    """Voxels on which members differ, and voxels that any of them gives to a class."""
    stacked = torch.stack(list(decided))
    return int((stacked != stacked[0]).any(dim=0).sum()), int((stacked > 0).any(dim=0).sum())


def _cleaned(found: ClassMap, classes: Classes, scan: Scan, settings: InferenceConfig) -> ClassMap:
    """Without the connected parts (voxels that touch, if only at a corner) that `settings` leave out."""
    if not settings.largest_component and not settings.min_component_ml:
        return found
    least = settings.min_component_ml * 1000 / float(np.prod(scan.spacing_mm))
    for number, class_id in enumerate(classes.names):
        inside = classes.mask_of(found, class_id)
        labelled: Any = ndimage.label(inside, np.ones((3, 3, 3)))
        parts, count = labelled
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        sizes[0] = 0
        kept = sizes >= max(least, 1)
        if settings.largest_component:
            kept &= np.arange(len(sizes)) == sizes.argmax()
        dropped = inside & ~kept[parts]
        if classes.overlapping:
            found[number] &= ~dropped
        else:
            found[dropped] = 0
    return found


def _axis(text: str) -> Axis:
    known: dict[str, Axis] = {"axial": "axial", "coronal": "coronal", "sagittal": "sagittal"}
    return known.get(text, "auto")
