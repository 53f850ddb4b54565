"""DICOM files made by hand, as small as they can be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    RTStructureSetStorage,
    generate_uid,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def image(pixels: np.ndarray, kind: UID = CTImageStorage, **elements: Any) -> Dataset:
    """One image without a place; `elements` are set last."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = kind
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID = dataset.SeriesInstanceUID = generate_uid()
    dataset.PatientID, dataset.PatientName, dataset.Modality = "id-1", "Doe^Jane", "CT"
    dataset.PatientBirthDate = dataset.PatientSex = dataset.StudyID = dataset.AccessionNumber = ""
    dataset.StudyDate = dataset.StudyTime = dataset.SeriesNumber = dataset.ReferringPhysicianName = ""
    dataset.Manufacturer = ""
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = "1.2.3.4", ""
    dataset.Rows, dataset.Columns = pixels.shape[-2:] if pixels.shape[-1] != 3 else pixels.shape[-3:-1]
    dataset.SamplesPerPixel = 3 if pixels.shape[-1] == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.shape[-1] == 3 else "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(pixels.dtype.kind == "i")
    if pixels.shape[-1] == 3:
        dataset.PlanarConfiguration = 0
    dataset.PixelData = np.ascontiguousarray(pixels).tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def series(
    voxels: np.ndarray,
    orientation: Sequence[float] = AXIAL,
    spacing_mm: Sequence[float] = (3.0, 2.0, 1.0),
    origin_mm: Sequence[float] = (10.0, -20.0, 30.0),
    **elements: Any,
) -> list[Dataset]:
    """Slices of a volume [Z, H, W], spaced (z, row, column), with instance numbers against their order."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    uid = generate_uid()
    datasets = []
    for number, plane in enumerate(voxels):
        position = np.array(origin_mm) + number * spacing_mm[0] * np.cross(row, column)
        placed = {
            "SeriesInstanceUID": uid,
            "StudyInstanceUID": generate_uid(entropy_srcs=[uid]),
            "ImagePositionPatient": [round(float(step), 6) for step in position],
            "ImageOrientationPatient": [round(float(step), 8) for step in orientation],
            "PixelSpacing": list(spacing_mm[1:]),
            "SliceThickness": spacing_mm[0],
            "InstanceNumber": len(voxels) - number,
        }
        datasets.append(image(plane, **(placed | elements)))
    return datasets


def save(datasets: Sequence[Dataset], folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Write datasets as files, called by number unless named."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in names or [f"IM{number:04d}" for number in range(len(datasets))]]
    for path, dataset in zip(paths, datasets, strict=True):
        dataset.save_as(path, enforce_file_format=True)
    return paths


def enhanced(slices: Sequence[Dataset], order: Sequence[int]) -> Dataset:
    """The slices as one file of frames, stored in `order`, each with its own rescale slope."""
    first = slices[0]
    pixels = np.stack([np.frombuffer(slices[number].PixelData, np.int16) for number in order])
    dataset = image(
        pixels.reshape(len(order), first.Rows, first.Columns), EnhancedMRImageStorage, Modality="MR"
    )
    dataset.NumberOfFrames = len(order)
    shared, groups = Dataset(), []
    shared.PlaneOrientationSequence = Items([_with(ImageOrientationPatient=first.ImageOrientationPatient)])
    measures = _with(PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness)
    shared.PixelMeasuresSequence = Items([measures])
    for number in order:
        group = Dataset()
        place = _with(ImagePositionPatient=slices[number].ImagePositionPatient)
        group.PlanePositionSequence = Items([place])
        scale = _with(RescaleSlope=number + 1, RescaleIntercept=0, RescaleType="US")
        group.PixelValueTransformationSequence = Items([scale])
        groups.append(group)
    dataset.SharedFunctionalGroupsSequence = Items([shared])
    dataset.PerFrameFunctionalGroupsSequence = Items(groups)
    return dataset


def structures(of: Dataset, outlines: dict[str, list[np.ndarray]]) -> Dataset:
    """A structure set of the series of `of`: contours [points, 3] in LPS mm by the name of the structure."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = RTStructureSetStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = generate_uid(), of.StudyInstanceUID
    dataset.Modality, dataset.PatientID = "RTSTRUCT", of.PatientID
    study = _with(RTReferencedSeriesSequence=Items([_with(SeriesInstanceUID=of.SeriesInstanceUID)]))
    frame = _with(RTReferencedStudySequence=Items([study]))
    dataset.ReferencedFrameOfReferenceSequence = Items([frame])
    names = enumerate(outlines, start=1)
    rois = [
        _with(ROINumber=number, ROIName=name, ReferencedFrameOfReferenceUID="1.2") for number, name in names
    ]
    dataset.StructureSetROISequence = Items(rois)
    contours = []
    for number, group in enumerate(outlines.values(), start=1):
        items = [_contour(points) for points in group]
        contours.append(_with(ReferencedROINumber=number, ContourSequence=Items(items)))
    dataset.ROIContourSequence = Items(contours)
    return dataset


def segmentation(
    datasets: Sequence[Dataset],
    masks: np.ndarray,
    kind: str = "BINARY",
    names: Sequence[str] = ("liver", "Tumour"),
    **elements: Any,
) -> Dataset:
    """A SEG of masks [Z, H, W, segments], as highdicom writes it; `elements` go to highdicom."""
    import highdicom as hd
    from highdicom.sr.coding import CodedConcept
    from pydicom.sr.codedict import codes

    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=CodedConcept("10200004", "SCT", "Liver"),
            algorithm_type="MANUAL",
        )
        for number, name in enumerate(names, start=1)
    ]
    return hd.seg.Segmentation(
        source_images=[*datasets],
        pixel_array=masks,
        segmentation_type=kind,
        segment_descriptions=descriptions,
        series_instance_uid=hd.UID(),
        series_number=2,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="m",
        manufacturer_model_name="m",
        software_versions="1",
        device_serial_number="1",
        **elements,
    )


def _contour(points: np.ndarray) -> Dataset:
    data = [round(float(value), 4) for value in points.ravel()]
    return _with(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=len(points), ContourData=data)


def _with(**elements: Any) -> Dataset:
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset
