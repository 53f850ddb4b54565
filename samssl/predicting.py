"""Masks of new scans as files, in the scans' own voxels.

    <out>/NAME_mask.nii.gz       class ids; NAME_CLASS.nii.gz of each where classes overlap; .png of 2D images
    <out>/NAME_seg.dcm           instead of these with `format=dicom_seg`
    <out>/NAME_entropy.nii.gz    with `entropy`
    <out>/labels.json            class id to name
    <out>/predictions.csv        for each scan volumes, uncertainty, warnings, or why there is no mask

NAME is that of the scan's file: who keeps it from others must keep these files from them, too. A DICOM SEG
names the patient as well, as it belongs to the scan's study (`samssl.data.seg_output`): it stays where the
scan stays. What is printed names no scan.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pandas as pd
from tqdm import tqdm

from samssl.config import PositiveInt, UserError, config
from samssl.data.entries import known_modality, plain_name
from samssl.data.layouts.listing import stem
from samssl.data.pointed import Pointer, Pointing, Space, read_pointers
from samssl.data.readers.dicom import read_header, read_modality
from samssl.data.readers.files import is_dicom
from samssl.data.scans import Modality, is_image
from samssl.data.seg_output import write_seg
from samssl.data.sources import DataSource, find_sources
from samssl.files import write_json, write_text, written_aside
from samssl.inference import InferenceConfig, LoadedBundle, Prediction, pointed_classes

Kind = Literal["nifti", "png", "dicom_seg"]
"""Of files of masks."""
LABELS_FILE, TABLE_FILE = "labels.json", "predictions.csv"


@config
class PredictConfig(InferenceConfig):
    """A model bundle and scans to their masks."""

    bundle: Path
    """The bundle that `finetune` wrote."""
    scans: tuple[Path, ...]
    """Files and folders; of a folder every scan, as `prepare` finds them. They need no masks."""
    out: Path
    """Folder for the masks."""
    more_bundles: tuple[Path, ...] = ()
    """Bundles of the same classes (folds, seeds) that predict together with it."""
    base: Path | None = None
    """The bundles' base weights, if they are not where they were when they were made."""
    format: Kind | Literal["auto"] = "auto"
    """Of the masks; auto: PNG of PNG, JPEG and other 2D images, else NIfTI. `dicom_seg`, for DICOM, refers to
    the scan's images and repeats its patient and study: such a file has to stay with the scan."""
    prompts: Path | None = None
    """Points and boxes for a promptable bundle: a CSV or JSON file with the columns scan, label, object, x,
    y, z, x2, y2, z2 and inside."""
    prompt_space: Space = "voxels"
    """What x, y, z in `prompts` are: `voxels` of the scan's own grid from 0, in the order of its file, or RAS
    mm."""
    prompt_labels: dict[PositiveInt, str] | None = None
    """Ids and names of the labels that `prompts` name; null: those of the bundle."""
    entropy: bool = False
    """Also write each voxel's entropy, from 0 (sure) to 1 (no idea)."""


@dataclass(frozen=True)
class Asked:
    """One scan to segment."""

    name: str
    image: Path
    files: tuple[Path, ...] = ()
    """Of a DICOM series."""
    modality: Modality | None = None
    """As the file says it."""

    @property
    def dicom_files(self) -> tuple[Path, ...]:
        """Every file of it if it is DICOM, else nothing."""
        return self.files or ((self.image,) if is_dicom(self.image) else ())


def run_predict(config: PredictConfig) -> None:
    """Write the masks, and say where they are and how fast it was.

    Raises:
        UserError: there is no scan, or some could not be segmented; the others are.
    """
    pointers = read_pointers(config.prompts) if config.prompts else []
    bundle = LoadedBundle(
        [config.bundle, *config.more_bundles], config.base, prompted=config.prompts is not None
    )
    asked = find_scans(config, bundle)
    pointings = _pointings(config, pointers, asked)
    began, rows = time.monotonic(), []
    classes = pointed_classes(bundle.bundles[0], pointings[0]) if pointings else bundle.classes
    write_json(config.out / LABELS_FILE, classes.names)
    for number, scan in enumerate(tqdm(asked, desc="predict", unit="scan", mininterval=2), start=1):
        rows.append(_row(config, bundle, scan, pointings[number - 1] if pointings else None))
        for warning in rows[-1]["warnings"]:
            tqdm.write(f"predict: scan {number} of {len(asked)} is unlike the training data. {warning}")
    table = pd.DataFrame(rows).assign(warnings=[" ".join(row["warnings"]) for row in rows])
    write_text(config.out / TABLE_FILE, table.to_csv(index=False))
    if not bundle.knows_training_data:
        print(
            "predict: whether scans look like the training data is unknown: the bundle is of an older version"
        )
    failed = int((table["problem"] != "").sum())
    print(
        f"predict: {len(asked) - failed} masks in {time.monotonic() - began:.1f} s: {config.out}", flush=True
    )
    if failed:
        raise UserError(
            f"{failed} of {len(asked)} scans could not be segmented; the column `problem` of "
            f"{config.out / TABLE_FILE} says why."
        )


def find_scans(config: PredictConfig, bundle: LoadedBundle) -> list[Asked]:
    """The scans of all files and folders.

    Raises:
        UserError: there is none, two have the same name, or masks would be written among scans.
    """
    found = [scan for path in config.scans for scan in _below(path.expanduser(), config, bundle)]
    if not found:
        raise UserError("No scans are given. Name files or folders: samssl predict BUNDLE SCAN... --out DIR.")
    name, count = Counter(scan.name for scan in found).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{count} scans would have the mask {name}_mask. Segment them into folders of their own."
        )
    return found


def _below(path: Path, config: PredictConfig, bundle: LoadedBundle) -> Iterator[Asked]:
    if not path.exists():
        raise UserError(f"There is no scan {path}.")
    if not path.is_dir():
        told = read_modality(read_header(path, ("Modality",))) if is_dicom(path) else None
        yield Asked(plain_name(stem(path)), path, (), told)
        return
    if config.out.absolute().is_relative_to(path.absolute()):
        raise UserError(
            f"{config.out} lies in {path}, whose files are taken for scans. Choose another folder as out."
        )
    source = DataSource(
        root=path,
        modality=config.modality or bundle.default_modality,
        labels=bundle.classes.labels,
        public_names=True,
    )
    for entry in find_sources(source, "predict").entries:
        yield Asked(entry.case, entry.image, entry.files, known_modality(entry.modality or ""))


def _pointings(config: PredictConfig, pointers: Sequence[Pointer], asked: Sequence[Asked]) -> list[Pointing]:
    """What is pointed out in each scan; nothing without prompts.

    Raises:
        UserError: naming the row that is of no scan.
    """
    of_scan: dict[str, list[Pointer]] = {scan.name: [] for scan in asked}
    for pointer in pointers:
        name = plain_name(stem(Path(pointer.scan))) if pointer.scan else asked[0].name
        if name not in of_scan or (not pointer.scan and len(asked) > 1):
            raise UserError(
                f"{pointer.source} must say in the column `scan` which of the {len(asked)} scans it points "
                "at, by the name of its file."
            )
        of_scan[name].append(pointer)
    if not pointers:
        return []
    return [Pointing(of_scan[scan.name], config.prompt_space, config.prompt_labels) for scan in asked]


def _row(
    config: PredictConfig, bundle: LoadedBundle, scan: Asked, pointing: Pointing | None
) -> dict[str, Any]:
    """Write the mask of a scan; its row of the table."""
    try:
        kind = _kind(config, scan)
        found = bundle.predict(
            scan.image, config, files=scan.files, modality=scan.modality, pointing=pointing
        )
        _save(config, scan, found, kind)
    except UserError as error:
        return {"scan": scan.name, "problem": str(error), "warnings": ()}
    volumes = {f"{name}_ml": found.volume_ml(class_id) for class_id, name in found.names.items()}
    return {
        "scan": scan.name,
        "problem": "",
        "warnings": found.warnings,
        "uncertainty": found.uncertainty,
        "disagreement": found.disagreement,
        **volumes,
    }


def _kind(config: PredictConfig, scan: Asked) -> Kind:
    """What kind of file the mask of a scan is to be.

    Raises:
        UserError: the scan cannot have a mask of the kind that is asked for.
    """
    flat = is_image(scan.image) and not scan.dicom_files
    if config.format == "png" and not flat:
        raise UserError("A PNG holds a single 2D image, and this scan is none: set format=nifti.")
    if config.format == "dicom_seg" and not scan.dicom_files:
        raise UserError("A DICOM SEG is of DICOM images, and this scan is none: set format=nifti.")
    if config.format == "auto":
        return "png" if flat else "nifti"
    return config.format


def _save(config: PredictConfig, scan: Asked, found: Prediction, kind: Kind) -> None:
    stem = config.out / scan.name
    if kind != "dicom_seg":
        save_prediction(found, stem, as_png=kind == "png", entropy=config.entropy)
        return
    drawn = "SEMIAUTOMATIC" if config.prompts else "AUTOMATIC"
    path = stem.with_name(f"{stem.name}_seg.dcm")
    write_seg(path, found.mask, found.classes, scan.dicom_files, volume=config.volume, drawn=drawn)
    if config.entropy:
        path = stem.with_name(f"{stem.name}_entropy.nii.gz")
        _save_nifti(path, found.entropy.astype(np.float32), found.affine, "entropy")


def save_prediction(found: Prediction, stem: Path, *, as_png: bool, entropy: bool = False) -> None:
    """Write the files of one prediction, whose names begin with `stem`."""
    masks: dict[str, np.ndarray] = {"mask": found.mask}
    if found.classes.overlapping:
        masks = {
            plain_name(name): found.inside(class_id).astype(np.uint8)
            for class_id, name in found.names.items()
        }
    if entropy:
        masks["entropy"] = found.entropy.astype(np.float32)
    for kind, array in masks.items():
        if as_png:
            _save_png(stem.with_name(f"{stem.name}_{kind}.png"), array[0])
        else:
            text = ", ".join(f"{class_id} {name}" for class_id, name in found.names.items())
            _save_nifti(stem.with_name(f"{stem.name}_{kind}.nii.gz"), array, found.affine, text)


def _save_nifti(path: Path, array: np.ndarray, affine: np.ndarray, text: str) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = text.encode("ascii", "replace")[:79]
    with written_aside(path) as partial:
        named = partial.with_name(f"{partial.name}.nii.gz")  # nibabel goes by the suffix
        nib.save(image, named)
        named.replace(partial)


def _save_png(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    if array.dtype.kind == "f":
        array = (255 * array).round()
    values = array.astype(np.uint8 if array.max() < 256 else np.uint16)
    with written_aside(path) as partial:
        Image.fromarray(values).save(partial, "PNG")
