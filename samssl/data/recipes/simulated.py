"""Simulated subjects: the MNI152 template, warped, shaded and made noisy anew for each.

They stand in for a cohort where none may be shipped. One averaged brain cannot show what a method is
worth on patients, so whatever is made of them is to be labelled as simulated.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float, Integer
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from samssl.config import Count, PositiveFloat, PositiveInt, UserError, config
from samssl.data.parallel import Run, local_map, with_progress
from samssl.files import read_json, sha256_file, write_json, written_aside

LABELS = {0: "background", 1: "grey matter", 2: "white matter", 3: "cerebrospinal fluid"}

NOTICE = """\
Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute,
McGill University. Permission to use, copy, modify, and distribute this software and its documentation for
any purpose and without fee is hereby granted, provided that the above copyright notice appear in all
copies. The authors and McGill University make no representations about the suitability of this software for
any purpose. It is provided "as is" without express or implied warranty. The authors are not responsible for
any data loss, equipment damage, property loss, or injury to subjects or patients resulting from the use or
misuse of this software package."""

# Raised when the same settings would give other voxels than before.
_VERSION = 1
_MARGIN_MM = 15.0
# (width of the smoothing kernel in mm, standard deviation of each component in mm)
_DEFORMATIONS = ((22.0, 3.5), (9.0, 1.3))
_SMALLEST_JACOBIAN = 0.25


@config
class SimulateConfig:
    """A cohort of simulated T1-weighted brain scans with tissue masks, in the Decathlon layout."""

    out: Path
    """Folder of the cohort."""
    subjects: PositiveInt = 24
    """How many subjects to simulate."""
    spacing_mm: PositiveFloat = 3.0
    """Edge of the cubic voxels."""
    seed: Count = 0
    """Another seed, other subjects."""
    workers: Count = 0
    """Processes that simulate; 0: one for each CPU."""


@dataclass(frozen=True)
class Cohort:
    """A simulated cohort on disk."""

    root: Path
    subjects: int
    wrote: bool
    """False: it was there already."""


@dataclass(frozen=True)
class _Template:
    """The template at 1 mm, cut to the brain, blurred as voxels of the wanted size would."""

    t1: Float[np.ndarray, "X Y Z"]
    tissues: Float[np.ndarray, "3 X Y Z"]
    """Share of grey matter, white matter and cerebrospinal fluid in each voxel."""
    origin_mm: Float[np.ndarray, "3"]
    """RAS position of the first voxel."""


def simulate(settings: SimulateConfig, run: Run | None = None) -> Cohort:
    """Write the cohort, whole or not at all; does nothing when the same one is there.

    `run` maps a function over items in whatever processes; by default in local ones.

    Raises:
        UserError: `out` holds something else.
    """
    out = settings.out.expanduser().absolute()
    recipe = {"version": _VERSION, "spacing_mm": settings.spacing_mm, "seed": settings.seed}
    if _is_there(out, settings.subjects, recipe):
        return Cohort(out, settings.subjects, wrote=False)
    with written_aside(out) as folder:
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True)
        task = partial(write_subject, folder, seed=settings.seed, spacing_mm=settings.spacing_mm)
        subjects = range(1, settings.subjects + 1)
        results = (run or local_map(settings.workers))(task, subjects)
        digests: dict[str, str] = {}
        for files in with_progress(results, len(subjects), "simulate", "subject"):
            digests |= files
        write_json(folder / "dataset.json", _dataset_json(settings.subjects, recipe, digests))
    return Cohort(out, settings.subjects, wrote=True)


def write_subject(folder: Path, subject: int, *, seed: int, spacing_mm: float) -> dict[str, str]:
    """Write one subject's image and mask below `folder`; returns their SHA-256 by relative name."""
    image, mask, affine = simulate_subject(subject, seed=seed, spacing_mm=spacing_mm)
    digests = {}
    for part, voxels in (("imagesTr", image), ("labelsTr", mask)):
        name = f"{part}/{_name(subject)}"
        nifti = nib.Nifti1Image(voxels, affine)
        nifti.header["descrip"] = b"SIMULATED, from the MNI152 template"
        nifti.header.set_xyzt_units("mm")
        nib.save(nifti, folder / name)
        digests[name] = sha256_file(folder / name)
    return digests


def simulate_subject(
    subject: int, *, seed: int, spacing_mm: float
) -> tuple[Integer[np.ndarray, "X Y Z"], Integer[np.ndarray, "X Y Z"], Float[np.ndarray, "4 4"]]:
    """Image (int16), mask (uint8, ids of `LABELS`) and affine to RAS mm of one subject."""
    generator = np.random.default_rng([seed, subject])
    template = _template(spacing_mm)
    points_mm = _grid_mm(template.t1.shape, spacing_mm)
    sources_mm = random_warp(points_mm, spacing_mm, generator)
    t1 = map_coordinates(template.t1, sources_mm, order=1)
    tissues = np.stack([map_coordinates(tissue, sources_mm, order=1) for tissue in template.tissues])
    background = 1 - tissues.sum(axis=0, keepdims=True)
    mask = np.concatenate([background, tissues]).argmax(axis=0).astype(np.uint8)
    image = _acquire(t1, mask, spacing_mm, generator)
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = template.origin_mm + points_mm[:, 0, 0, 0]
    return image, mask, affine


def random_warp(
    points_mm: Float[np.ndarray, "3 X Y Z"], spacing_mm: float, generator: np.random.Generator
) -> Float[np.ndarray, "3 X Y Z"]:
    """Where each point comes from: a smooth random deformation that folds nowhere, turned and scaled."""
    centre = points_mm.mean(axis=(1, 2, 3), keepdims=True)
    turn = Rotation.from_euler("xyz", generator.normal(0, 3, 3), degrees=True).as_matrix()
    affine = turn @ np.diag(generator.uniform(0.93, 1.09, 3))
    shift = sum(
        _smooth_noise(points_mm.shape, width_mm / spacing_mm, generator) * deviation_mm
        for width_mm, deviation_mm in _DEFORMATIONS
    )
    moved = np.einsum("ij,jxyz->ixyz", affine, points_mm - centre) + centre
    while jacobian_determinant(moved + shift, spacing_mm).min() < _SMALLEST_JACOBIAN:
        shift = 0.9 * shift
    return moved + shift


def jacobian_determinant(
    sources_mm: Float[np.ndarray, "3 X Y Z"], spacing_mm: float
) -> Float[np.ndarray, "X Y Z"]:
    """How much the warp stretches space at each point; not above 0 where it folds."""
    derivatives = np.stack([np.stack(np.gradient(component, spacing_mm)) for component in sources_mm])
    return np.linalg.det(np.moveaxis(derivatives, (0, 1), (-2, -1)))


@lru_cache(maxsize=1)
def _template(spacing_mm: float) -> _Template:
    from nilearn import datasets

    load = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    images = [loaded(resolution=1) for loaded in load]
    t1, grey, white = (image.get_fdata(dtype=np.float32) for image in images)
    fluid = np.clip((t1 > 0) - grey - white, 0, None, dtype=np.float32)
    inside = np.argwhere(t1 > 0)
    first, last = inside.min(axis=0), inside.max(axis=0) + 1
    box = tuple(slice(start, stop) for start, stop in zip(first, last, strict=True))
    # Blurring over one voxel's width before sampling keeps fine structure from aliasing.
    t1, *tissues = (gaussian_filter(part[box], spacing_mm / 2.355) for part in (t1, grey, white, fluid))
    return _Template(t1, np.stack(tissues), images[0].affine[:3, :3] @ first + images[0].affine[:3, 3])


def _grid_mm(shape: tuple[int, ...], spacing_mm: float) -> Float[np.ndarray, "3 X Y Z"]:
    """Positions of a subject's voxels in mm from the first voxel of the template."""
    axes = [np.arange(-_MARGIN_MM, size + _MARGIN_MM, spacing_mm) for size in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def _smooth_noise(shape: tuple[int, ...], width: float, generator: np.random.Generator) -> np.ndarray:
    """Noise of unit deviation, as smooth as a Gaussian kernel `width` voxels wide makes it."""
    axes = range(len(shape) - 3, len(shape))
    noise = gaussian_filter(generator.standard_normal(shape), width, mode="wrap", axes=tuple(axes))
    return noise / noise.std()


def _acquire(
    t1: np.ndarray, mask: np.ndarray, spacing_mm: float, generator: np.random.Generator
) -> Integer[np.ndarray, "X Y Z"]:
    """Give the anatomy this subject's contrast, shading, noise and intensity scale."""
    fluid, grey, white = (float(t1[mask == label].mean()) for label in (3, 1, 2))
    # Tissues keep their order, as in any T1-weighted scan; how far they lie apart varies.
    contrast = np.cumsum([0, *generator.uniform((0.15, 0.25, 0.15, 0.05), (0.35, 0.45, 0.40, 0.15))])
    image = np.interp(t1, [0, fluid, grey, white, 1], contrast)
    image *= np.exp(0.15 * _smooth_noise(t1.shape, 45.0 / spacing_mm, generator))
    # Magnitude images have Rician noise: Gaussian in the real and the imaginary part.
    deviation = generator.uniform(0.01, 0.04) * contrast[-2]
    real, imaginary = generator.normal(0, deviation, (2, *t1.shape))
    image = np.hypot(image + real, imaginary)
    return np.rint(image / image.max() * generator.uniform(300, 3000)).astype(np.int16)


def _dataset_json(subjects: int, recipe: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    names = [_name(subject) for subject in range(1, subjects + 1)]
    return {
        "name": "SimulatedBrains",
        "description": f"SIMULATED subjects, made of the MNI152 template (ICBM 2009a). {_one_line(NOTICE)}",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(label): name for label, name in LABELS.items()},
        "numTraining": subjects,
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [],
        "simulated": {"recipe": recipe, "sha256": dict(sorted(digests.items()))},
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _name(subject: int) -> str:
    return f"simulated_{subject:03d}.nii.gz"


def _is_there(out: Path, subjects: int, recipe: dict[str, Any]) -> bool:
    """Whether this very cohort is at `out`; another simulated one may be replaced, anything else not."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        facts = read_json(out / "dataset.json")
        digests = facts["simulated"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{out} holds something else than a simulated cohort. Choose another folder."
        ) from None
    found = {name: sha256_file(out / name) for name in digests if (out / name).is_file()}
    return found == digests and facts == _dataset_json(subjects, recipe, digests)
