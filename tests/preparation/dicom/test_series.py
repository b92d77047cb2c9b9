import numpy as np
import pytest
from pydicom.uid import generate_uid
from scipy.spatial.transform import Rotation

from clinfuse.preparation.dicom.headers import list_series

OBLIQUE = Rotation.from_euler("xyz", (12, -20, 33), degrees=True).as_matrix()


def test_the_patient_does_not_show_in_what_a_series_prints(dicom, tmp_path):
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine())
    (series,) = list_series(tmp_path)
    assert {"MRN-0042", "Doe^Jane", "19610203", "ACC-991"} <= set(series.identities)
    shown = f"{series} {series!r}"
    assert not any(identity in shown for identity in series.identities)


@pytest.fixture(scope="module")
def three_series(dicom, tmp_path_factory):
    """A localiser of three planes, an axial CT with thick slices and one with thin ones."""
    folder = tmp_path_factory.mktemp("three")
    planes = (np.eye(3), OBLIQUE, OBLIQUE.T, OBLIQUE @ OBLIQUE, np.roll(np.eye(3), 1, 0))
    scout = {"number": 1, "series_uid": generate_uid(), "description": "scout"}
    for number, turn in enumerate(planes):
        plane = dicom.hounsfield((1, 16, 16))
        dicom.write(folder / f"{number}", plane, dicom.affine(turn=turn), **scout)
    for number, (name, step) in enumerate([("head thick", 5.0), ("head thin", 2.0)], start=2):
        affine = dicom.affine((0.9, 0.9, step))
        dicom.write(folder, dicom.hounsfield(seed=number), affine, number=number, description=name)
    return folder


def test_several_volumes_are_listed_to_choose_from(dicom, three_series):
    with pytest.raises(ValueError, match="expected one series") as error:
        dicom.read(three_series)
    for part in ("series=NUMBER", "1. CT 'scout'", "not parallel", "2. CT 'head thick', 8 of 24"):
        assert part in str(error.value)
    assert "0.90 x 0.90 x 2.00 mm" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_series_is_chosen_by_number_by_uid_and_by_a_part_of_its_description(dicom, three_series):
    found = list_series(three_series)
    for name in (3, "3", found[2].uid, "THIN"):
        assert dicom.read(three_series, name).image.GetSpacing()[2] == pytest.approx(2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("head", "got 2"), ("sagittal", "got 0"), (9, "got 0"), ("scout", "not parallel")],
)
def test_a_name_of_no_volume_or_of_several_is_refused(dicom, three_series, name, reason):
    with pytest.raises(ValueError, match=reason):
        dicom.read(three_series, name)


def test_a_localiser_is_passed_over(dicom, tmp_path):
    localiser = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    uid = generate_uid()  # some scanners keep the scout in the very series it planned
    dicom.write(tmp_path / "a", dicom.hounsfield((6, 9, 9)), dicom.affine(), (), localiser,
                series_uid=uid)  # fmt: skip
    dicom.write(tmp_path / "b", dicom.hounsfield(), dicom.affine(), series_uid=uid)
    np.testing.assert_array_equal(dicom.voxels(dicom.read(tmp_path)), dicom.hounsfield())
    np.testing.assert_array_equal(dicom.voxels(dicom.read(tmp_path, uid)), dicom.hounsfield())


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
    dicom.write(tmp_path, dicom.hounsfield(shape), dicom.affine(), changes=changes)
    with pytest.raises(ValueError, match=f"expected a volume, got only 1. .*{reason}"):
        dicom.read(tmp_path)


def test_the_echoes_of_a_series_are_series_of_their_own(dicom, tmp_path):
    uid = generate_uid()
    for echo in (1, 2):
        dicom.write(
            tmp_path / f"{echo}", dicom.hounsfield(seed=echo), dicom.affine(), (),
            {"EchoNumbers": echo}, modality="MR", series_uid=uid, description="PD T2",
        )  # fmt: skip
    np.testing.assert_array_equal(
        dicom.voxels(dicom.read(tmp_path, "echo 2")), dicom.hounsfield(seed=2)
    )
    with pytest.raises(ValueError, match="got 2 among"):
        dicom.read(tmp_path, uid)


def test_an_empty_folder_is_refused(dicom, tmp_path):
    with pytest.raises(FileNotFoundError, match="found none in"):
        dicom.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        list_series(tmp_path / "absent")


@pytest.mark.parametrize("uid", ["1.2.826.0.1.3680043.8.498.42", None])
def test_two_patients_are_refused_in_a_folder_and_in_a_series_and_not_named(dicom, tmp_path, uid):
    for number, patient in enumerate(("MRN-1", "MRN-2")):
        dicom.write(
            tmp_path / f"{number}", dicom.hounsfield(), dicom.affine(), patient_id=patient,
            series_uid=uid or generate_uid(),
        )  # fmt: skip
    with pytest.raises(ValueError, match="expected the files of one patient, got 2") as error:
        dicom.read(tmp_path, 1)
    assert "MRN-" not in str(error.value)
