import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from clinfuse.preparation.cohorts.rire import cases, write_metaimage

HEADER = """Group length := 200
Modality := MR
Comments := not for use outside of this project

Group length := 100
Slice thickness := 4.000000
{tilt}
Comments := T1

Group length := 100
Patient Orientation := {orientation}

Group length := 100
Image dimensions := 3
Rows := 3
Columns := 5
Slices := 2
Pixel size := 1.250000 : 1.250000
Bits allocated := 16
"""

VOXELS = np.arange(-10, 20, dtype=np.int16).reshape(2, 3, 5)
"""The thirty voxels of the example in the project's description of its format."""


def compressed(data: bytes) -> bytes:
    """The bytes as the program compress packs them, in its simplest form: literals of nine bits.

    Before the codes would grow to ten bits the table is cleared, after a multiple of eight codes,
    for codes are read in groups of eight.
    """
    bits = ""
    for start in range(0, len(data), 247):
        codes = [*data[start : start + 247], 256]
        bits += "".join(f"{code:09b}"[::-1] for code in codes)
    bits += "0" * (-len(bits) % 8)
    packed = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    return b"\x1f\x9d\x90" + packed


def draw(
    folder: Path, orientation: str = "L : P : H", tilt: str = "", packed: bool = False
) -> Path:
    folder.mkdir(parents=True)
    (folder / "header.ascii").write_text(HEADER.format(orientation=orientation, tilt=tilt))
    data = VOXELS.astype(">i2").tobytes()
    if packed:
        (folder / "image.bin.Z").write_bytes(compressed(data))
    else:
        (folder / "image.bin").write_bytes(data)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_an_image_is_written_as_its_header_describes_it(tmp_path, packed):
    image = sitk.ReadImage(
        write_metaimage(draw(tmp_path / "ct", packed=packed), tmp_path / "out" / "ct.mha")
    )
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), VOXELS)
    assert image.GetSpacing() == (1.25, 1.25, 4.0)
    assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    middle = image.TransformContinuousIndexToPhysicalPoint([2.0, 1.0, 0.5])
    np.testing.assert_allclose(middle, 0, atol=1e-9)


def test_a_turned_image_is_the_same_head_from_the_other_side(tmp_path):
    plain = write_metaimage(draw(tmp_path / "ct"), tmp_path / "ct.mha")
    turned = write_metaimage(draw(tmp_path / "mr", "R : A : F"), tmp_path / "mr.mha")
    seen = sitk.DICOMOrient(sitk.ReadImage(turned), "LPS")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(seen), VOXELS[::-1, ::-1, ::-1])
    np.testing.assert_allclose(seen.GetOrigin(), sitk.ReadImage(plain).GetOrigin(), atol=1e-9)


def test_patients_come_unregistered_with_the_chosen_contrast(tmp_path):
    for patient in ("patient_001", "patient_109"):
        for name in ("ct", "mr_T1", "mr_MP-RAGE"):
            draw(tmp_path / "rire" / patient / patient / name)
    first, second = cases(tmp_path / "rire", tmp_path / "work", contrast="mprage")
    assert (first.patient, second.patient) == ("patient_001", "patient_109")
    assert first.files["mri"] == tmp_path / "work" / "patient_001" / "mr_MP-RAGE.mha"
    assert not first.is_registered and set(first.files) == {"mri", "ct"}
    again = first.files["ct"].stat().st_mtime_ns
    cases(tmp_path / "rire", tmp_path / "work", contrast="mprage")
    assert first.files["ct"].stat().st_mtime_ns == again


def test_metaimages_are_taken_as_they_are_where_there_is_no_other_header(tmp_path, write):
    for name in ("ct", "mr_T1"):
        write(tmp_path / "patient_002" / name / f"patient_002_{name}.mhd")
    (case,) = cases(tmp_path, tmp_path / "work")
    assert case.files["mri"].name == "patient_002_mr_T1.mhd"
    write(tmp_path / "patient_002" / "ct" / "stray.mhd")
    with pytest.raises(ValueError, match="expected one MetaImage"):
        cases(tmp_path, tmp_path / "work")


def test_patients_without_ct_or_contrast_are_named_and_can_be_left_out(tmp_path):
    draw(tmp_path / "patient_008" / "mr_T1")
    draw(tmp_path / "patient_001" / "mr_T1")
    draw(tmp_path / "patient_001" / "ct")
    with pytest.raises(
        FileNotFoundError, match=r"case patient_008: expected ct, found \['mr_T1'\]"
    ):
        cases(tmp_path, tmp_path / "work")
    (case,) = cases(tmp_path, tmp_path / "work", skip_incomplete=True)
    assert case.case_id == "patient_001"
    with pytest.raises(ValueError, match="expected a contrast of"):
        cases(tmp_path, tmp_path / "work", contrast="flair")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "image.bin").write_bytes(b"\0" * 59), "voxels of 2 bytes, got 59 bytes"),
        (lambda f: (f / "image.bin").unlink(), "expected image.bin or image.bin.Z, found neither"),
        (lambda f: (f / "header.ascii").write_text("Rows := 3"), "expected 'Columns', got None"),
    ],
)
def test_an_image_that_is_not_what_its_header_says_is_refused(tmp_path, damage, sentence):
    folder = draw(tmp_path / "ct")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        write_metaimage(folder, tmp_path / "ct.mha")
    assert not (tmp_path / "ct.mha").exists()


def test_what_unpacks_to_more_than_its_header_says_is_not_unpacked_any_further(tmp_path):
    folder = draw(tmp_path / "ct", packed=True)
    (folder / "image.bin.Z").write_bytes(gzip.compress(bytes(50_000_000)))  # gzip reads it as well
    with pytest.raises(ValueError, match=r"voxels of 2 bytes, got 61 bytes"):
        write_metaimage(folder, tmp_path / "ct.mha")


def test_a_broken_archive_is_refused(tmp_path):
    folder = draw(tmp_path / "ct", packed=True)
    (folder / "image.bin.Z").write_bytes(b"nothing that compress wrote")
    with pytest.raises(ValueError, match="expected a file of compress"):
        write_metaimage(folder, tmp_path / "ct.mha")


def test_a_gantry_that_leans_is_refused_and_one_that_stands_is_not(tmp_path):
    write_metaimage(draw(tmp_path / "a", tilt="Gantry tilt := 0.000000"), tmp_path / "a.mha")
    with pytest.raises(ValueError, match=r"expected no gantry tilt, got 12\.5"):
        write_metaimage(draw(tmp_path / "b", tilt="Gantry tilt := 12.5"), tmp_path / "b.mha")
