from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.data import get_testdata_file
from pydicom.uid import (
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)
from scipy.spatial.transform import Rotation

from clinfuse.preparation.dicom import (
    affine_of,
    choose_series,
    list_series,
    read_series,
    series_of_file,
    upright,
)

OBLIQUE = Rotation.from_euler("xyz", (12, -20, 33), degrees=True).as_matrix()


def hounsfield(shape=(8, 20, 24), seed=0):
    """Whole numbers from air to bone."""
    values = np.random.default_rng(seed).integers(-1000, 2000, shape)
    return values.astype(np.float32)


def read(folder, series=None):
    return read_series(choose_series(list_series(folder), folder, series), folder)


def voxels(scan):
    return sitk.GetArrayFromImage(scan.image)


# --- what a folder holds ------------------------------------------------------------------------


def test_series_are_found_below_a_folder_by_content_and_told_apart(dicom, tmp_path):
    dicom.write(tmp_path / "a" / "deep", hounsfield(), dicom.affine(), number=3)
    mr = dicom.write(
        tmp_path / "b", hounsfield((6, 10, 12)), dicom.affine((2, 3, 4)),
        modality="MR", number=1, description="T2 tra",
    )  # fmt: skip
    (tmp_path / "a" / "notes.dcm").write_text("no DICOM, whatever its name says")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    first, second = list_series(tmp_path)
    assert (first.modality, first.uid, first.description) == ("MR", mr.series_uid, "T2 tra")
    assert (first.n_slices, first.size, first.spacing_mm) == (6, (12, 10), (2, 3, 4))
    assert first.patient == "MRN-0042"
    assert second.modality == "CT" and len(second.files) == second.n_slices == 8


def test_a_directory_file_and_what_holds_no_image_are_passed_over(dicom, tmp_path):
    dicom.write(tmp_path, hounsfield(), dicom.affine())
    for name, class_uid in (
        ("DICOMDIR", pydicom.uid.MediaStorageDirectoryStorage),
        ("report", pydicom.uid.BasicTextSRStorage),
    ):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = class_uid
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.SeriesInstanceUID = generate_uid()
        dataset.save_as(tmp_path / name, enforce_file_format=True)
    assert [series.modality for series in list_series(tmp_path)] == ["CT"]


def test_a_multi_frame_file_counts_its_frames(dicom, tmp_path):
    dicom.write(tmp_path, hounsfield(), dicom.affine(), multi_frame=True)
    (series,) = list_series(tmp_path)
    assert (len(series.files), series.n_slices) == (1, 8)
    assert series.spacing_mm == pytest.approx((0.9, 0.9, 5.0))
    assert series_of_file(series.files[0])[0].frames == series.frames


def test_the_patient_does_not_show_in_what_a_series_prints(dicom, tmp_path):
    dicom.write(tmp_path, hounsfield(), dicom.affine())
    (series,) = list_series(tmp_path)
    assert {"MRN-0042", "Doe^Jane", "19610203", "ACC-991"} <= set(series.identities)
    shown = f"{series} {series!r}"
    assert not any(identity in shown for identity in series.identities)


# --- choosing -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_series(dicom, tmp_path_factory):
    """A localiser of three planes, an axial CT with thick slices and one with thin ones."""
    folder = tmp_path_factory.mktemp("three")
    planes = (np.eye(3), OBLIQUE, OBLIQUE.T, OBLIQUE @ OBLIQUE, np.roll(np.eye(3), 1, 0))
    scout = {"number": 1, "series_uid": generate_uid(), "description": "scout"}
    for number, turn in enumerate(planes):
        plane = hounsfield((1, 16, 16))
        dicom.write(folder / f"{number}", plane, dicom.affine(turn=turn), **scout)
    for number, (name, step) in enumerate([("head thick", 5.0), ("head thin", 2.0)], start=2):
        affine = dicom.affine((0.9, 0.9, step))
        dicom.write(folder, hounsfield(seed=number), affine, number=number, description=name)
    return folder


def test_several_volumes_are_listed_to_choose_from(three_series):
    with pytest.raises(ValueError, match="expected one series") as error:
        read(three_series)
    for part in ("series=NUMBER", "1. CT 'scout'", "not parallel", "2. CT 'head thick', 8 of 24"):
        assert part in str(error.value)
    assert "0.90 x 0.90 x 2.00 mm" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_series_is_chosen_by_number_by_uid_and_by_a_part_of_its_description(three_series):
    found = list_series(three_series)
    for name in (3, "3", found[2].uid, "THIN"):
        assert read(three_series, name).image.GetSpacing()[2] == pytest.approx(2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("head", "got 2"), ("sagittal", "got 0"), (9, "got 0"), ("scout", "not parallel")],
)
def test_a_name_of_no_volume_or_of_several_is_refused(three_series, name, reason):
    with pytest.raises(ValueError, match=reason):
        read(three_series, name)


def test_a_localiser_is_passed_over(dicom, tmp_path):
    localiser = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    uid = generate_uid()  # some scanners keep the scout in the very series it planned
    dicom.write(tmp_path / "a", hounsfield((6, 9, 9)), dicom.affine(), (), localiser,
                series_uid=uid)  # fmt: skip
    dicom.write(tmp_path / "b", hounsfield(), dicom.affine(), series_uid=uid)
    np.testing.assert_array_equal(voxels(read(tmp_path)), hounsfield())
    np.testing.assert_array_equal(voxels(read(tmp_path, uid)), hounsfield())


@pytest.mark.parametrize(
    ("shape", "changes", "reason"),
    [
        ((6, 9, 9), {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a localiser"),
        ((3, 9, 9), {}, "3 slices, fewer than 5"),
        ((6, 9, 9), {"ImagePositionPatient": None}, "without a position"),
        ((6, 9, 9), {"Modality": "US"}, "neither CT nor MR"),
        ((6, 9, 9), {"PhotometricInterpretation": "RGB"}, "colour"),
    ],
)
def test_what_is_no_volume_is_named_when_it_is_all_there_is(
    dicom, tmp_path, shape, changes, reason
):
    dicom.write(tmp_path, hounsfield(shape), dicom.affine(), changes=changes)
    with pytest.raises(ValueError, match=f"expected a volume, got only 1. .*{reason}"):
        read(tmp_path)


def test_the_echoes_of_a_series_are_series_of_their_own(dicom, tmp_path):
    uid = generate_uid()
    for echo in (1, 2):
        dicom.write(
            tmp_path / f"{echo}", hounsfield(seed=echo), dicom.affine(), (),
            {"EchoNumbers": echo}, modality="MR", series_uid=uid, description="PD T2",
        )  # fmt: skip
    np.testing.assert_array_equal(voxels(read(tmp_path, "echo 2")), hounsfield(seed=2))
    with pytest.raises(ValueError, match="got 2 among"):
        read(tmp_path, uid)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="found none in"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        list_series(tmp_path / "absent")


@pytest.mark.parametrize("uid", ["1.2.826.0.1.3680043.8.498.42", None])
def test_two_patients_are_refused_in_a_folder_and_in_a_series_and_not_named(dicom, tmp_path, uid):
    for number, patient in enumerate(("MRN-1", "MRN-2")):
        dicom.write(
            tmp_path / f"{number}", hounsfield(), dicom.affine(), patient_id=patient,
            series_uid=uid or generate_uid(),
        )  # fmt: skip
    with pytest.raises(ValueError, match="expected the files of one patient, got 2") as error:
        read(tmp_path, 1)
    assert "MRN-" not in str(error.value)


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [None, OBLIQUE, np.diag([-1.0, -1, 1]), np.diag([1.0, -1, -1])])
def test_a_series_reads_as_gdcm_reads_it(dicom, tmp_path, turn):
    dicom.write(tmp_path, hounsfield(), dicom.affine(turn=turn))
    scan = read(tmp_path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    theirs = reader.Execute()
    np.testing.assert_array_equal(voxels(scan), sitk.GetArrayFromImage(theirs))
    np.testing.assert_allclose(affine_of(scan.image), affine_of(theirs), atol=1e-5)
    assert scan.image.GetPixelID() == sitk.sitkFloat32
    assert (scan.modality, scan.patient, scan.notes) == ("CT", "MRN-0042", ())


def test_the_order_of_files_does_not_matter(dicom, tmp_path):
    dicom.write(tmp_path, hounsfield(), dicom.affine())
    files = sorted(tmp_path.iterdir())
    for file, name in zip(files, (5, 2, 7, 0, 1, 6, 3, 4), strict=True):
        file.rename(tmp_path / f"x{name}")
    np.testing.assert_array_equal(voxels(read(tmp_path)), hounsfield())


@pytest.mark.parametrize("multi_frame", [False, True])
def test_every_slice_is_scaled_by_its_own_slope(dicom, tmp_path, multi_frame):
    slopes = np.linspace(0.3, 2.7, 8)
    signal = np.abs(hounsfield())
    dicom.write(
        tmp_path, signal, dicom.affine(), modality="MR", slope=slopes, intercept=7,
        multi_frame=multi_frame,
    )  # fmt: skip
    error = np.abs(voxels(read(tmp_path)) - signal).max(axis=(1, 2))
    assert (error <= slopes / 2 + 1e-3).all()  # what storing as whole numbers costs


@pytest.mark.parametrize("multi_frame", [False, True])
@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLosslessSV1, RLELossless])
def test_lossless_compression_changes_nothing(dicom, tmp_path, syntax, multi_frame):
    dicom.write(tmp_path, hounsfield(), dicom.affine(), syntax=syntax, multi_frame=multi_frame)
    np.testing.assert_array_equal(voxels(read(tmp_path)), hounsfield())


def five_of(name, folder, **changes):
    """A series of five slices that all hold the pixels of a file that comes with pydicom."""
    path = get_testdata_file(name, download=False)
    folder.mkdir()
    for k in range(5):
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.SeriesInstanceUID, dataset.PatientID = "1.2.3", "1"
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [0, 0, 3 * k]
        for attribute, value in changes.items():
            setattr(dataset, attribute, value)
        dataset.save_as(folder / f"{k}")
    return folder


@pytest.mark.parametrize(
    "name",
    ["bigendian", "implicit", "expb", "RLE", "jp2klossless", "jpeg_ls_lossless", "padded"],
)
def test_what_others_encoded_reads_as_what_they_encoded(tmp_path, name):
    scan = read(five_of(f"MR_small_{name}.dcm", tmp_path / "series"))
    expected = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False)).pixel_array
    np.testing.assert_array_equal(voxels(scan), np.stack([expected] * 5))


def test_what_others_truncated_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got a truncated or corrupt file"):
        read(five_of("MR_truncated.dcm", tmp_path / "series"))


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_a_header_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a readable DICOM header.*badVR\.dcm"):
        series_of_file(Path(get_testdata_file("badVR.dcm", download=False)))


def test_jpeg_of_twelve_bits_is_decoded(tmp_path):
    folder = five_of("JPGExtended.dcm", tmp_path / "series", Modality="MR", PixelSpacing=[1, 1])
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(folder / "0"))
    np.testing.assert_array_equal(voxels(read(folder))[0], theirs[0])
    assert theirs.max() > 255


def test_jpeg_is_decoded(dicom, tmp_path):
    ramp = np.broadcast_to(np.arange(0, 240, 10, dtype=np.float32), (8, 20, 24))
    dicom.write(tmp_path, ramp, dicom.affine(), syntax=JPEGBaseline8Bit, bits=8, intercept=0)
    assert np.abs(voxels(read(tmp_path)) - ramp).max() <= 4  # of quality 95


def test_compression_that_nothing_here_decodes_is_named(dicom, tmp_path):
    dicom.write(tmp_path, hounsfield(), dicom.affine(), syntax=HTJ2KLossless)
    with pytest.raises(ValueError, match=r"got High-Throughput JPEG 2000.*which neither can here"):
        read(tmp_path)


def test_padding_outside_the_circle_becomes_air_and_is_noted(dicom, tmp_path):
    ct = hounsfield()
    ct[:, :2] = -3024
    dicom.write(tmp_path, ct, dicom.affine(), changes={"PixelPaddingValue": -2000})
    scan = read(tmp_path)
    assert (voxels(scan)[:, :2] == -1000).all()
    np.testing.assert_array_equal(voxels(scan)[:, 2:], ct[:, 2:])
    assert scan.notes == (f"{8 * 2 * 24} voxels of padding were set to air, -1000 HU",)


def test_a_ct_without_rescaling_is_noted(dicom, tmp_path):
    dicom.write(tmp_path, hounsfield(), dicom.affine(), changes={"RescaleIntercept": None})
    scan = read(tmp_path)
    assert scan.notes == ("the files state no rescaling: stored values were taken for HU",)
    np.testing.assert_array_equal(voxels(scan), hounsfield() + 1024)


def test_identical_copies_are_dropped_with_a_note(dicom, tmp_path):
    header = dicom.write(tmp_path / "once", hounsfield(), dicom.affine())
    dicom.write(
        tmp_path / "again", hounsfield(), dicom.affine(), skip=(0, 1, 3, 4, 5, 7),
        series_uid=header.series_uid,
    )  # fmt: skip
    scan = read(tmp_path)
    np.testing.assert_array_equal(voxels(scan), hounsfield())
    assert scan.notes == ("2 identical copies of slices were dropped",)


def test_slices_that_differ_at_one_position_are_refused(dicom, tmp_path):
    header = dicom.write(tmp_path / "once", hounsfield(), dicom.affine())
    dicom.write(
        tmp_path / "again", hounsfield(seed=1), dicom.affine(), skip=range(7),
        series_uid=header.series_uid,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"one slice at each position.*at 5\.00 mm"):
        read(tmp_path)


def test_missing_slices_are_refused_with_their_place(dicom, tmp_path):
    dicom.write(tmp_path, hounsfield((12, 8, 8)), dicom.affine(), skip=(4, 8, 9))
    expected = r"5.00 mm apart, got 10.00 mm from -15.00 to -5.00 mm, 15.00 mm from 5.00 to 20.00"
    with pytest.raises(ValueError, match=expected):
        read(tmp_path)


@pytest.mark.parametrize("off_mm", [0.05, 0.07])
def test_uneven_slices_are_refused_from_one_percent_and_a_hundredth_on(dicom, tmp_path, off_mm):
    dicom.write(tmp_path, hounsfield(), dicom.affine())
    last = sorted(tmp_path.iterdir())[-1]
    dataset = pydicom.dcmread(last)
    dataset.ImagePositionPatient = [-40, -50, 5.0 + off_mm]  # 5 mm apart: 0.06 mm are allowed
    dataset.save_as(last)
    if off_mm < 0.06:
        assert read(tmp_path).image.GetSpacing()[2] == pytest.approx(5, abs=0.01)
    else:
        with pytest.raises(ValueError, match=r"got 5.07 mm from 0.00 to 5.07 mm"):
            read(tmp_path)


def test_a_slice_shifted_sideways_is_refused(dicom, tmp_path):
    dicom.write(tmp_path, hounsfield(), dicom.affine())
    file = sorted(tmp_path.iterdir())[3]
    dataset = pydicom.dcmread(file)
    dataset.ImagePositionPatient = [-37, -50, -15]
    dataset.save_as(file)
    with pytest.raises(ValueError, match=f"{file.name} 3.00 mm beside it"):
        read(tmp_path)


@pytest.mark.parametrize("spacing", [["0", "0"], ["0.9", "0"], None])
def test_a_pixel_size_of_zero_or_none_is_refused(dicom, tmp_path, spacing):
    dicom.write(tmp_path, hounsfield(), dicom.affine(), changes={"PixelSpacing": spacing})
    with pytest.raises(ValueError, match="expected a pixel size above zero"):
        read(tmp_path)


def test_inverted_grey_is_refused(dicom, tmp_path):
    inverted = {"PhotometricInterpretation": "MONOCHROME1"}
    dicom.write(tmp_path, hounsfield(), dicom.affine(), changes=inverted)
    with pytest.raises(ValueError, match="expected MONOCHROME2, got MONOCHROME1"):
        read(tmp_path)


def test_slices_of_two_sizes_are_refused(dicom, tmp_path):
    header = dicom.write(tmp_path / "a", hounsfield(), dicom.affine())
    affine = dicom.affine(origin_mm=(-40, -50, 10))
    dicom.write(tmp_path / "b", hounsfield((2, 9, 9)), affine, series_uid=header.series_uid)
    with pytest.raises(ValueError, match=r"slices of one size, got \(9, 9\), \(24, 20\)"):
        read(tmp_path)


@pytest.mark.parametrize("kept", [0, 200, 700, 0.6, 0.98])
@pytest.mark.parametrize("syntax", [pydicom.uid.ExplicitVRLittleEndian, JPEG2000Lossless])
def test_a_truncated_file_is_refused_wherever_it_ends(dicom, tmp_path, kept, syntax):
    dicom.write(tmp_path, hounsfield(), dicom.affine(), syntax=syntax)
    file = sorted(tmp_path.iterdir())[-1].rename(tmp_path / "last.dcm")
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"(truncated|cut off|empty).*last\.dcm"):
        read(tmp_path)


# --- tilt ---------------------------------------------------------------------------------------


def test_a_tilted_scan_gets_perpendicular_axes_and_a_note_of_the_angle(dicom, tmp_path):
    affine = dicom.affine((1, 1, 5), tilt_deg=15)
    dicom.write(tmp_path, hounsfield(), affine)
    scan = read(tmp_path)
    axes = np.reshape(scan.image.GetDirection(), (3, 3))
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    assert scan.image.GetSpacing() == pytest.approx((1, 1, 5 * np.cos(np.radians(15))), abs=1e-5)
    assert scan.notes == ("a gantry tilt of 15.0 degrees was taken out, by resampling",)
    np.testing.assert_array_equal(voxels(scan)[0, :20], hounsfield()[0])  # only others move


def test_a_linear_field_survives_the_tilt_exactly(dicom, tmp_path):
    affine = dicom.affine((1, 1, 5), tilt_deg=-20, turn=OBLIQUE)
    k, j, i = np.indices((8, 30, 20))
    points = np.stack([i, j, k, np.ones_like(i)], axis=-1) @ affine.T
    field = points[..., :3] @ (3.0, -5.0, 2.0)  # HU a mm along each axis of the patient
    dicom.write(tmp_path, field, affine, slope=0.01, intercept=0)
    image = read(tmp_path).image
    found = sitk.GetArrayFromImage(image)
    k, j, i = np.indices(found.shape)
    points = np.stack([i, j, k, np.ones_like(i)], axis=-1) @ affine_of(image).T
    scanned = found != -1000
    assert scanned.sum() > 0.9 * field.size
    inside = scanned & np.roll(scanned, 1, 1) & np.roll(scanned, -1, 1)
    inside[:, [0, -1]] = False
    error = np.abs(found - points[..., :3] @ (3.0, -5.0, 2.0))[inside]
    assert error.max() < 0.01  # of which 0.005 is storing


def test_a_drift_of_rounding_is_no_tilt(dicom, tmp_path):
    affine = dicom.affine()
    affine[1, 2] += 0.08 / 7
    dicom.write(tmp_path, hounsfield(), affine)
    scan = read(tmp_path)
    np.testing.assert_array_equal(voxels(scan), hounsfield())
    off_mm = (affine_of(scan.image) - affine) @ [[0, 0], [0, 0], [0, 7], [1, 1]]
    assert np.abs(off_mm).max() < 0.05 and scan.notes == ()


def test_a_tilt_that_only_the_header_states_is_noted(dicom, tmp_path):
    dicom.write(tmp_path, hounsfield(), dicom.affine(), changes={"GantryDetectorTilt": "12.5"})
    assert "states a gantry tilt of 12.5 degrees" in read(tmp_path).notes[0]


def test_an_image_with_perpendicular_axes_is_its_own_upright_one():
    image = sitk.GetImageFromArray(hounsfield())
    image.SetSpacing((0.7, 0.8, 5))
    image.SetOrigin((3, -4, 5))
    image.SetDirection(OBLIQUE.ravel().tolist())
    same = upright(image, outside=0)
    np.testing.assert_allclose(affine_of(same), affine_of(image), atol=1e-9)
    np.testing.assert_allclose(sitk.GetArrayFromImage(same), hounsfield(), atol=1e-2)
