import os

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import generate_uid
from scipy.spatial.transform import Rotation

from clinfuse.data.phantoms import make_phantom
from clinfuse.preparation.affines import affine_of, image_at
from clinfuse.preparation.derived_series import write_derived_series
from clinfuse.preparation.dicom.headers import list_series
from clinfuse.preparation.identifiers import hashed
from clinfuse.preparation.reading import read_scan

OBLIQUE = Rotation.from_euler("xyz", (12, -20, 33), degrees=True).as_matrix()
IDENTITIES = ("MRN-0042", "Doe", "Jane", "19610203", "20240131", "101500", "ACC-991", "S-7")


@pytest.fixture(scope="module")
def fused():
    """Values that no 16 bits hold exactly."""
    return make_phantom(2, seed=4, shape=(12, 40, 32), spacing_mm=(10, 5, 6)).mri / 40 - 1


@pytest.fixture
def source(dicom, tmp_path):
    """Folder and header of the MR series that was fused."""
    header = dicom.write(
        tmp_path / "mr", np.full((12, 40, 32), 7.0), dicom.affine((6, 5, 10), turn=OBLIQUE),
        modality="MR", description="T2 tra",
    )  # fmt: skip
    return tmp_path / "mr", header


def on_its_grid(fused, like):
    image = sitk.GetImageFromArray(fused)
    image.CopyInformation(read_scan(like).image)
    return image


def grids_apart_mm(image, other):
    return np.abs(affine_of(image) - affine_of(other)).max()


def by_gdcm(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def test_the_series_reads_back_in_its_place_by_us_and_by_gdcm(tmp_path, source, fused):
    image = on_its_grid(fused, source[0])
    files = write_derived_series(tmp_path / "out" / "dicom", image, like=source[0])
    assert len(files) == 12 and sorted((tmp_path / "out" / "dicom").iterdir()) == files
    step = (fused.max() - fused.min()) / 65534
    for back in (read_scan(tmp_path / "out" / "dicom").image, by_gdcm(tmp_path / "out" / "dicom")):
        error = np.abs(sitk.GetArrayFromImage(back) - fused).max()
        off_mm = grids_apart_mm(back, image)
        print(f"largest error {error / step:.3f} steps of {step:.2e}, grid off by {off_mm:.1e} mm")
        assert error <= 0.51 * step + 1e-6  # 1e-6: float32 of values around 1
        assert off_mm < 1e-4


@pytest.mark.parametrize(
    ("spacing_mm", "turn"),
    [
        ((0.9, 0.8, 5), OBLIQUE),
        ((1, 2, 3), np.diag([-1.0, -1, 1])),
        ((2, 2, 2), np.diag([1, 1, -1.0])),  # left-handed
        ((1.5, 0.7, 1 / 3), np.roll(np.eye(3), 1, 0)),  # sagittal
    ],
)
def test_any_grid_is_written_where_it_is(tmp_path, source, fused, spacing_mm, turn):
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing_mm
    affine[:3, 3] = (-101.23456789, 17 / 3, 1234.5)
    image = image_at(fused[:, :25], affine)
    write_derived_series(tmp_path / "out", image, like=source[0])
    back = read_scan(tmp_path / "out").image
    points = np.random.default_rng(0).uniform(1, 10, (20, 3))
    for index in points:  # another order of slices is another index, not another place
        at = image.TransformContinuousIndexToPhysicalPoint(index.tolist())
        value, there = (sitk.Resample(x, grid_of_one(at)) for x in (image, back))
        assert there[0, 0, 0] == pytest.approx(value[0, 0, 0], abs=1e-3)


def grid_of_one(point):
    grid = sitk.Image(1, 1, 1, sitk.sitkFloat32)
    grid.SetOrigin(point)
    return grid


def test_study_patient_and_frame_of_reference_are_kept_and_the_rest_is_new(tmp_path, source, fused):
    folder, header = source
    files = write_derived_series(
        tmp_path / "out", on_its_grid(fused, folder), like=folder, description="roi_diffusion",
        keep_ids=True,
    )  # fmt: skip
    slices = [pydicom.dcmread(file) for file in files]
    originals = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    for new in slices:
        assert new.StudyInstanceUID == header.study_uid
        assert new.FrameOfReferenceUID == header.frame_uid
        assert (new.PatientID, str(new.PatientName)) == ("MRN-0042", "Doe^Jane")
        assert (new.StudyDate, new.PatientBirthDate) == ("20240131", "19610203")
        assert new.SeriesInstanceUID == slices[0].SeriesInstanceUID != header.series_uid
        assert new.SeriesNumber != header.number
        assert list(new.ImageType)[:2] == ["DERIVED", "SECONDARY"]
        assert new.SeriesDescription == "clinfuse roi_diffusion RESEARCH USE ONLY"
        assert "RESEARCH USE ONLY" in new.DerivationDescription
        assert new.ContentQualification == "RESEARCH" and new.BurnedInAnnotation == "NO"
    uids = {dataset.SOPInstanceUID for dataset in slices + originals}
    assert len(uids) == len(slices) + len(originals)
    named = [one.SourceImageSequence[0].ReferencedSOPInstanceUID for one in slices]
    assert named == [original.SOPInstanceUID for original in originals]


def test_frames_of_a_multi_frame_source_are_named_by_number(dicom, tmp_path, fused):
    dicom.write(
        tmp_path / "mr", np.full((12, 40, 32), 7.0), dicom.affine((6, 5, 10)), modality="MR",
        multi_frame=True,
    )  # fmt: skip
    (file,) = (tmp_path / "mr").iterdir()
    files = write_derived_series(tmp_path / "out", on_its_grid(fused, file), like=file)
    named = [pydicom.dcmread(one).SourceImageSequence[0] for one in files]
    assert [item.ReferencedFrameNumber for item in named] == list(range(1, 13))


def test_without_keep_ids_no_file_names_the_patient_or_a_date(tmp_path, source, fused):
    folder, _ = source
    files = write_derived_series(
        tmp_path / "out", on_its_grid(fused, folder), like=folder, salt="apis"
    )
    for file in files:
        dataset = pydicom.dcmread(file)
        assert dataset.PatientID == str(dataset.PatientName) == hashed("MRN-0042", "apis")
        said = " ".join(str(one.value) for one in dataset.iterall() if one.VR != "UI")
        assert not [identity for identity in IDENTITIES if identity in said]
        assert not [item for item in dataset if item.VR in ("DA", "TM", "DT") and item.value]


def test_the_description_keeps_its_warning_however_long_it_is(tmp_path, source, fused):
    image = on_its_grid(fused, source[0])
    files = write_derived_series(tmp_path / "out", image, source[0], description="long " * 30)
    description = pydicom.dcmread(files[0]).SeriesDescription
    assert len(description) <= 64 and description.endswith(" RESEARCH USE ONLY")


def test_a_constant_volume_is_written(tmp_path, source, fused):
    image = on_its_grid(np.full_like(fused, 0.25), source[0])
    write_derived_series(tmp_path / "out", image, source[0])
    assert (sitk.GetArrayFromImage(read_scan(tmp_path / "out").image) == 0.25).all()


def test_the_series_to_follow_is_chosen_as_in_reading(dicom, tmp_path, source, fused):
    dicom.write(
        tmp_path / "mr" / "ct", np.zeros((6, 8, 8)), dicom.affine(), number=5,
        study_uid=source[1].study_uid, series_uid=generate_uid(), description="head CT",
    )  # fmt: skip
    image = sitk.GetImageFromArray(fused)
    with pytest.raises(ValueError, match="expected one series"):
        write_derived_series(tmp_path / "out", image, source[0])
    files = write_derived_series(tmp_path / "out", image, source[0], series="T2")
    assert pydicom.dcmread(files[0]).FrameOfReferenceUID == source[1].frame_uid
    (written,) = list_series(tmp_path / "out")
    assert written.modality == "MR"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_no_number_are_refused(tmp_path, source, fused, value):
    broken = fused.copy()
    broken[1, 2, 3] = value
    with pytest.raises(ValueError, match="got 1 that are NaN or infinite"):
        write_derived_series(tmp_path / "out", on_its_grid(broken, source[0]), source[0])
    assert [path.name for path in tmp_path.iterdir()] == ["mr"]


def test_files_that_are_there_are_never_written_over(tmp_path, source, fused):
    image = on_its_grid(fused, source[0])
    files = write_derived_series(tmp_path / "out", image, source[0])
    before = files[0].read_bytes()
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        write_derived_series(tmp_path / "out", image, source[0])
    assert files[0].read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="RLIMIT_FSIZE is POSIX's")
def test_a_disk_that_is_full_midway_leaves_nothing(tmp_path, source, fused):
    import resource
    import signal

    image = on_its_grid(fused, source[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # a slice has 2560 of pixels
    try:
        with pytest.raises(OSError):
            write_derived_series(tmp_path / "out", image, source[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["mr"]
