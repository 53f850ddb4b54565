"""Masks as DICOM SEG of the images that they were drawn on, through highdicom (PS3.3 A.51).

A SEG belongs to the study of its scan, and says whose it is: it repeats the patient (name, id, birth date,
sex) and the study (UID, id, date, time, accession number) as the images have them, which DICOM asks for
where they are known, and refers to the images by their UIDs. Nothing else of their headers is carried: no
physician, institution, device or description. It must stay where the scan is, and be kept from whom the
scan is kept from.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
from jaxtyping import Bool, Integer, Shaped
from pydicom.dataset import Dataset

from samssl.config import UserError
from samssl.data.classes import Classes
from samssl.data.readers.dicom import slice_sources
from samssl.data.readers.files import naming
from samssl.environment import installed_version
from samssl.files import written_aside

_PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
_STUDY = ("StudyID", "StudyDate", "StudyTime", "AccessionNumber")
_IMAGE = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality"),
    *("FrameOfReferenceUID", "Rows", "Columns", "NumberOfFrames", "ImagePositionPatient"),
    *("ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
SEG_SOURCE_TAGS = (*_PATIENT, *_STUDY, *_IMAGE)
"""All that is read of the images."""

Drawn = Literal["AUTOMATIC", "SEMIAUTOMATIC"]
"""By a model alone, or by one that was prompted."""
_LONGEST_NAME = 64


def write_seg(
    path: Path,
    mask: Shaped[np.ndarray, "..."],
    classes: Classes,
    files: Sequence[Path],
    *,
    volume: int | None = None,
    drawn: Drawn = "AUTOMATIC",
) -> None:
    """Write class ids [column, row, slice], or regions [K, column, row, slice], of the images in `files`.

    The array is on the voxels that `samssl.data.readers.dicom.read_dicom` gives of `files` and `volume`.
    Segments are called as the classes are; each frame refers to the image, or frame of an image, that it
    was drawn on.

    Raises:
        UserError: the images lie nowhere in particular, or lack what a SEG of them must repeat.
    """
    sources = slice_sources(files, files[0], volume)
    images = _images(list(dict.fromkeys(file for file, _ in sources)), files[0])
    planes = _planes(mask, classes, sources, images)
    with written_aside(path) as partial:
        _segmentation(images, planes, classes, drawn, files[0]).save_as(partial, enforce_file_format=True)


def _images(files: Sequence[Path], named: Path) -> Sequence[Dataset]:
    """Headers of the images, with what DICOM wants in them and they lack left empty."""
    with naming(named):
        images = [
            pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(SEG_SOURCE_TAGS))
            for file in files
        ]
    first = images[0]
    placed = first.get("ImagePositionPatient") or first.get("PerFrameFunctionalGroupsSequence")
    if not placed or not first.get("FrameOfReferenceUID"):
        raise UserError(
            f"{named} does not say where in the patient it lies, so that its DICOM SEG would lie nowhere. "
            "Set format=nifti."
        )
    if len(images) > 1 and any(int(image.get("NumberOfFrames") or 1) > 1 for image in images):
        raise UserError(f"{named} is of several files of frames, and a SEG is of one: set format=nifti.")
    for image in images:
        for name in (*_PATIENT, *_STUDY):
            setattr(image, name, image.get(name) or "")
        image.PatientSex = image.PatientSex if image.PatientSex in ("M", "F", "O") else ""
        if "ImageOrientationPatient" in first:  # the reader has found them equal but for rounding
            image.ImageOrientationPatient = first.ImageOrientationPatient
    return images


def _planes(
    mask: np.ndarray, classes: Classes, sources: Sequence[tuple[Path, int]], images: Sequence[Dataset]
) -> Integer[np.ndarray, "frames H W"] | Bool[np.ndarray, "frames H W K"]:
    """Segment numbers, or regions, of every image or frame in the order of `images`."""
    if classes.overlapping:
        planes = mask.transpose(3, 2, 1, 0)
    else:
        numbers = np.zeros(max(classes.names) + 1, np.uint8 if len(classes.names) < 256 else np.uint16)
        numbers[list(classes.names)] = np.arange(1, len(classes.names) + 1)
        planes = numbers[mask].transpose(2, 1, 0)
    if len(images) > 1:
        return planes
    frames = np.zeros((int(images[0].get("NumberOfFrames") or 1), *planes.shape[1:]), planes.dtype)
    frames[[frame for _, frame in sources]] = planes
    return frames


def _segmentation(
    images: Sequence[Dataset], planes: np.ndarray, classes: Classes, drawn: Drawn, named: Path
) -> Dataset:
    import highdicom as hd

    descriptions = _descriptions(classes, drawn)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they may quote a header
            return hd.seg.Segmentation(
                source_images=images,
                pixel_array=planes,
                segmentation_type="BINARY",
                segment_descriptions=descriptions,
                series_instance_uid=hd.UID(),
                series_number=1,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="samssl",
                manufacturer_model_name="samssl",
                software_versions=installed_version("samssl"),
                device_serial_number="none",
                series_description="Segmentation by samssl, not for clinical use",
            )
    # What it misses in a header it raises in its own words, which may quote that header.
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{named} lacks what a DICOM SEG must repeat of its images, or has it in a form that DICOM does "
            f"not allow ({type(error).__name__}). Set format=nifti."
        ) from None


def _descriptions(classes: Classes, drawn: Drawn) -> list[Any]:
    """A segment for each class. What it is stands in its name: it has no code of a public scheme."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        "samssl", codes.DCM.ArtificialIntelligence, installed_version("samssl")
    )
    if wrong := [name for name in classes.names.values() if len(name) > _LONGEST_NAME or "\\" in name]:
        raise UserError(
            f"DICOM has names of at most {_LONGEST_NAME} characters, without backslashes, and one of the "
            f"classes is called '{wrong[0]}'. Set format=nifti."
        )
    return [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
            segmented_property_type=hd.sr.CodedConcept(str(class_id), "99SAMSSL", name),
            algorithm_type=drawn,
            algorithm_identification=algorithm,
        )
        for number, (class_id, name) in enumerate(classes.names.items(), start=1)
    ]
