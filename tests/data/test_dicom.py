"""DICOM series, files of frames, and the sentences for what is no regular volume."""

import numpy as np
import pytest
from dicom_support import enhanced, image, save, series
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import compress
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
)

from samssl.config import UserError
from samssl.data.readers.codestream import codestream_size
from samssl.data.scans import Modality, read_scan

VOXELS = np.random.default_rng(0).integers(0, 2000, (4, 5, 6), dtype=np.int16)


def read(datasets, folder, modality: Modality = "CT", **options):
    return read_scan(folder, modality, "axial", files=save(datasets, folder), **options)


def test_slices_are_ordered_by_place_and_rescaled_to_hu(tmp_path):
    datasets = series(VOXELS, RescaleSlope=1, RescaleIntercept=-1024)
    scan = read([datasets[number] for number in (2, 0, 3, 1)], tmp_path)
    # DICOM runs towards the patient's left, back and head, as scans here do.
    np.testing.assert_array_equal(scan.voxels, VOXELS - 1024)
    assert scan.voxels.dtype == np.int16
    assert scan.spacing_mm == (3.0, 2.0, 1.0)
    np.testing.assert_allclose(scan.affine @ [1, 0, 0, 1], [-10, 20, 33, 1])


def test_a_slope_for_each_slice_is_applied(tmp_path):
    datasets = series(VOXELS, RescaleIntercept=0, Modality="PT")
    for number, dataset in enumerate(datasets):
        dataset.RescaleSlope = 0.5 + number
    scan = read(datasets, tmp_path, "PT")
    np.testing.assert_allclose(scan.voxels, VOXELS * (np.arange(4) + 0.5)[:, None, None], rtol=1e-6)


def test_enhanced_frames_are_ordered_by_their_own_places(tmp_path):
    [path] = save([enhanced(series(VOXELS), (3, 1, 0, 2))], tmp_path)
    scan = read_scan(path, "MR")
    np.testing.assert_allclose(scan.voxels, VOXELS * (np.arange(4) + 1)[:, None, None])
    assert scan.spacing_mm == (3.0, 2.0, 1.0)


@pytest.mark.parametrize(("modality", "inverted"), [("DX", True), ("CT", False)])
def test_monochrome1_is_inverted_where_values_are_no_units(tmp_path, modality, inverted):
    pixels = np.arange(30, dtype=np.uint16).reshape(5, 6)
    low_is_bright = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    [path] = save([image(pixels, Modality=modality, **low_is_bright)], tmp_path)
    voxels = read_scan(path, "XR").voxels[0]
    np.testing.assert_array_equal(voxels, 4095 - pixels if inverted else pixels)


def test_a_projection_has_the_spacing_of_its_pixels(tmp_path):
    pixels = np.arange(30, dtype=np.uint16).reshape(5, 6)
    [path] = save([image(pixels, Modality="DX", ImagerPixelSpacing=[0.2, 0.1])], tmp_path)
    scan = read_scan(path, "XR")
    assert scan.spacing_mm == (1.0, 0.2, 0.1)
    np.testing.assert_array_equal(scan.voxels[0], pixels)


def test_colour_becomes_luminance(tmp_path):
    grey = np.arange(30, dtype=np.uint8).reshape(5, 6)
    dataset = image(np.stack([grey] * 3, axis=-1), UltrasoundImageStorage, Modality="US")
    [path] = save([dataset], tmp_path)
    np.testing.assert_array_equal(read_scan(path, "US").voxels[0], grey)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_slices_are_the_same_voxels(tmp_path, syntax):
    datasets = series(np.tile(VOXELS, (1, 8, 8)))
    for dataset in datasets:
        if syntax == RLELossless:
            compress(dataset, syntax)
        else:
            compress(dataset, syntax, encoding_plugin="pylibjpeg")
    np.testing.assert_array_equal(read(datasets, tmp_path).voxels, np.tile(VOXELS, (1, 8, 8)))


def _moved(number, by_mm):
    datasets = series(VOXELS)
    place = datasets[number].ImagePositionPatient
    datasets[number].ImagePositionPatient = [float(a) + b for a, b in zip(place, by_mm, strict=True)]
    return datasets


def _tilted():
    datasets = series(VOXELS)
    for number, dataset in enumerate(datasets):
        dataset.ImagePositionPatient[1] += 0.5 * number
    return datasets


def _mixed():
    datasets = series(VOXELS)
    datasets[1].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    return datasets


def _with(number, **elements):
    datasets = series(VOXELS)
    for name, value in elements.items():
        setattr(datasets[number], name, value)
    return datasets


WRONG = {
    "missing slices, about 1: slices are 3.00 mm apart, with gaps of up to 6.00 mm": lambda: [
        dataset for number, dataset in enumerate(series(np.concatenate([VOXELS, VOXELS]))) if number != 3
    ],
    "uneven slice spacing, 2.00 to 4.00 mm": lambda: _moved(1, (0, 0, 1)),
    "duplicate slices: 1 of its 3 places": lambda: _moved(1, (0, 0, -3)),
    r"shifted by 9\.5 degrees against": _tilted,
    "different orientations": _mixed,
    "different sizes": lambda: _with(2, Rows=6, Columns=5),
    "different pixel spacings": lambda: _with(2, PixelSpacing=[2, 2]),
    "directions or spacings are void": lambda: _with(0, PixelSpacing=[0, 0]),
    r"promises \d+ bytes of voxels": lambda: _all(Rows=65535, Columns=65535),
    "units in a table": lambda: _with(0, ModalityLUTSequence=[series(VOXELS)[0]]),
}


def _all(**elements):
    datasets = series(VOXELS)
    for dataset in datasets:
        for name, value in elements.items():
            setattr(dataset, name, value)
    return datasets


@pytest.mark.parametrize(("sentence", "make"), WRONG.items(), ids=list(WRONG))
def test_what_is_no_regular_volume_is_refused_by_name(tmp_path, sentence, make):
    with pytest.raises(UserError, match=sentence) as error:
        read(make(), tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "Doe" not in str(error.value)


def test_several_volumes_at_the_same_places_are_chosen_from(tmp_path):
    first, second = series(VOXELS), series(VOXELS + 1)
    for number, datasets in enumerate((first, second)):
        for dataset in datasets:
            dataset.SeriesInstanceUID, dataset.TemporalPositionIdentifier = "1.2", number
    with pytest.raises(UserError, match=r"2 slices at each of its 4 places.*data\.volume, 0 to 1"):
        read([*second, *first], tmp_path)
    for volume in (0, 1):
        np.testing.assert_array_equal(
            read([*second, *first], tmp_path, volume=volume).voxels, VOXELS + volume
        )


def test_films_are_chosen_from(tmp_path):
    film = image(VOXELS.astype(np.uint16), UltrasoundMultiFrameImageStorage, Modality="US", NumberOfFrames=4)
    [path] = save([film], tmp_path)
    with pytest.raises(UserError, match=r"4 frames.*data\.volume, 0 to 3"):
        read_scan(path, "US")
    np.testing.assert_array_equal(read_scan(path, "US", volume=2).voxels[0], VOXELS[2])


def test_a_compressed_frame_that_claims_another_size_is_refused_before_it_is_decoded(tmp_path):
    datasets = series(np.tile(VOXELS, (1, 8, 8)))
    compress(datasets[0], JPEG2000Lossless, encoding_plugin="pylibjpeg")
    [frame] = [datasets[0].PixelData]
    at = frame.find(b"\xff\x4f\xff\x51") + 8
    lying = frame[:at] + (60000).to_bytes(4) * 2 + frame[at + 8 :]
    datasets[0].PixelData = lying
    with pytest.raises(UserError, match="40 x 48 pixels, a compressed frame in it 60000 x 60000"):
        read(datasets[:1], tmp_path)


def test_sizes_of_jpeg_streams():
    jpeg = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x0b\x08" + (7).to_bytes(2) + (9).to_bytes(2)
    assert codestream_size(jpeg) == (7, 9)
    assert codestream_size(b"\xff\xd8\xff\xe0\x00\x04ab") is None
    assert codestream_size(b"anything") is None


def test_deflated_files_are_refused(tmp_path):
    datasets = series(VOXELS)[:1]
    datasets[0].file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    with pytest.raises(UserError, match="deflated as a whole"):
        read(datasets, tmp_path)


def test_encapsulated_rubbish_is_refused(tmp_path):
    datasets = series(VOXELS)[:1]
    datasets[0].file_meta.TransferSyntaxUID = JPEG2000Lossless
    datasets[0].PixelData = encapsulate([b"rubbish!"])
    datasets[0]["PixelData"].is_undefined_length = True
    with pytest.raises(UserError, match="damaged"):
        read(datasets, tmp_path)
