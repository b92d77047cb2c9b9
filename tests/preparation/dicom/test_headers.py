from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

from clinfuse.preparation.dicom import headers
from clinfuse.preparation.dicom.headers import list_series, series_of_file


def test_series_are_found_below_a_folder_by_content_and_told_apart(dicom, tmp_path):
    dicom.write(tmp_path / "a" / "deep", dicom.hounsfield(), dicom.affine(), number=3)
    mr = dicom.write(
        tmp_path / "b", dicom.hounsfield((6, 10, 12)), dicom.affine((2, 3, 4)),
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
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine())
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
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine(), multi_frame=True)
    (series,) = list_series(tmp_path)
    assert (len(series.files), series.n_slices) == (1, 8)
    assert series.spacing_mm == pytest.approx((0.9, 0.9, 5.0))
    assert series_of_file(series.files[0])[0].frames == series.frames


def test_a_deflated_file_that_would_fill_the_memory_is_refused(dicom, tmp_path, monkeypatch):
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine())
    for path in sorted(tmp_path.iterdir()):
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        dataset.save_as(path, enforce_file_format=True)
    assert list_series(tmp_path)[0].n_slices == 8  # an honest one is read
    dataset.add_new((0x0029, 0x0010), "LO", "zeros")
    dataset.add_new((0x0029, 0x1000), "OB", bytes(20_000_000))
    dataset.save_as(path, enforce_file_format=True)
    assert path.stat().st_size < 50_000
    monkeypatch.setattr(headers, "MOST_INFLATED", 10_000_000)
    with pytest.raises(ValueError, match=f"unpacks to at most 10000000 bytes, got more: {path}"):
        list_series(tmp_path)


def test_more_frames_than_any_image_has_are_refused_before_they_are_counted(dicom, tmp_path):
    changes = {"NumberOfFrames": 2_000_000_000}
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine(), multi_frame=True, changes=changes)
    with pytest.raises(ValueError, match="expected at most 100000 frames, got 2000000000: "):
        list_series(tmp_path)


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_a_header_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a readable DICOM header.*badVR\.dcm"):
        series_of_file(Path(get_testdata_file("badVR.dcm", download=False)))


@pytest.mark.parametrize("damage", ["length", "syntax", "kind"])
def test_a_damaged_header_is_refused_without_quoting_the_patient(damage, dicom, tmp_path):
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine())
    file = sorted(tmp_path.iterdir())[-1]
    content = bytearray(file.read_bytes())
    if damage == "length":  # of the first element: all that follows becomes its value
        content[138:140] = (1081).to_bytes(2, "little")
    elif damage == "syntax":
        at = content.index(b"\x02\x00\x10\x00UI")
        content[at + 8 : at + 12] = b"9.9."
    else:
        at = content.index(b"\x28\x00\x10\x00US")  # of Rows
        content[at + 4 : at + 6] = b"U\0"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected .*, got ") as caught:
        dicom.read(tmp_path)
    said = str(caught.value)
    assert str(tmp_path) in said and "\n" not in said
    assert not [name for name in ("Doe", "MRN-0042", "19610203") if name in said]
