import gzip
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from clinfuse.data.phantoms import make_phantom, ras_affine
from clinfuse.preparation.affines import affine_of
from clinfuse.preparation.images import read_image
from clinfuse.preparation.reading import check_not_swapped, looks_like_ct, mixed_up, read_scan
from clinfuse.preparation.scan import Scan

SHAPE, SPACING_MM = (20, 150, 130), (5.0, 0.9, 0.9)
OBLIQUE = Rotation.from_euler("xyz", (12, -20, 33), degrees=True).as_matrix()
TO_RIGHT_AND_FRONT = np.diag([-1.0, -1, 1])
LPS = np.diag([-1.0, -1, 1, 1])

SPOT_MM = 4.0
"""Standard deviation of a bright spot: slices 5 mm apart sample it without aliasing."""


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(3, seed=1, shape=SHAPE, spacing_mm=SPACING_MM)


@pytest.fixture(scope="module")
def small():
    return make_phantom(0, seed=2, shape=(10, 24, 20), spacing_mm=(12, 9, 9)).ct_hu


def voxels(scan):
    return sitk.GetArrayFromImage(scan.image)


def positions_mm(affine, shape):
    """LPS position of every voxel of an array (k, j, i)."""
    k, j, i = np.indices(shape)
    return np.stack([i, j, k, np.ones_like(i)], axis=-1) @ affine[:3].T


def displacement_mm(affine, other, shape):
    """How far apart two grids place a voxel of theirs, at most."""
    corners = np.array([(i, j, k, 1) for i, j, k in np.ndindex(2, 2, 2)], float)
    corners[:, :3] *= np.subtract(shape[::-1], 1)
    return np.linalg.norm(corners @ (affine - other).T, axis=1).max()


def centroids_mm(image, spots_mm):
    """Centres of mass of what is bright, each voxel counted to the spot next to it."""
    weight = np.maximum(sitk.GetArrayFromImage(image), 0)
    points = positions_mm(affine_of(image), weight.shape)
    nearest = np.argmin([np.square(points - spot).sum(-1) for spot in spots_mm], axis=0)
    return np.array(
        [np.average(points[nearest == n], axis=0, weights=weight[nearest == n])
         for n in range(len(spots_mm))]
    )  # fmt: skip


def resampled(image, affine, shape):
    """An image looked up, linearly, at the voxels of an array (k, j, i), sheared or not."""
    grid = sitk.Image(*map(int, shape[::-1]), sitk.sitkFloat32)
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    grid.SetSpacing(spacing_mm.tolist())
    grid.SetOrigin(affine[:3, 3].tolist())
    grid.SetDirection((affine[:3, :3] / spacing_mm).ravel().tolist())
    return sitk.GetArrayFromImage(
        sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, -1000.0)
    )


# --- there and back (issue: "Must show 3") --------------------------------------------------------


@pytest.mark.parametrize("multi_frame", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("turn", [TO_RIGHT_AND_FRONT, OBLIQUE], ids=["axial", "oblique"])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_phantom_returns_from_dicom_within_rounding_and_in_its_place(
    dicom, tmp_path, phantom, modality, turn, multi_frame
):
    values = phantom.ct_hu if modality == "CT" else phantom.mri
    slope, intercept = (1.0, -1024.0) if modality == "CT" else (np.linspace(0.01, 0.02, 20), 0.0)
    affine = dicom.affine((0.9, 0.9, 5.0), turn=turn)
    dicom.write(
        tmp_path, values, affine, modality=modality, slope=slope, intercept=intercept,
        multi_frame=multi_frame,
    )  # fmt: skip
    scan = read_scan(tmp_path)
    error = np.abs(voxels(scan) - values).max(axis=(1, 2))
    off_mm = displacement_mm(affine_of(scan.image), affine, values.shape)
    print(f"largest error {error.max():.4f}, largest displacement {off_mm:.6f} mm")
    assert (error <= np.asarray(slope) / 2 + 1e-3).all()
    assert off_mm < 0.001
    assert scan.modality == modality and scan.notes == ()


@pytest.mark.parametrize("turn", [np.eye(3), OBLIQUE], ids=["axial", "oblique"])
@pytest.mark.parametrize(
    ("tilt_deg", "modality", "multi_frame"),
    [(15.0, "CT", False), (15.0, "CT", True), (15.0, "MR", True), (-23.0, "CT", False)],
)
def test_spots_of_a_tilted_scan_are_read_where_they_were(
    dicom, tmp_path, tilt_deg, modality, turn, multi_frame
):
    affine = dicom.affine((0.9, 0.9, 5.0), tilt_deg, turn)
    shape = (16, 120, 110)
    middle = (affine @ [*(np.array(shape[::-1]) - 1) / 2, 1])[:3]
    corners = np.array([(-24, -24, -9), (24, -24, 9), (-24, 24, 9), (24, 24, -9)])
    jitter = np.random.default_rng(0).uniform(-3, 3, (4, 3))
    spots_mm = middle + (corners + jitter) @ turn.T
    points = positions_mm(affine, shape)
    off = [np.square(points - spot).sum(-1) for spot in spots_mm]
    values = 1000 * sum(np.exp(-square / (2 * SPOT_MM**2)) for square in off)
    dicom.write(
        tmp_path, values, affine, modality=modality, slope=0.05, intercept=0.0,
        multi_frame=multi_frame,
    )  # fmt: skip
    scan = read_scan(tmp_path)
    assert f"tilt of {abs(tilt_deg):.1f} degrees" in scan.notes[0]
    off_mm = np.linalg.norm(centroids_mm(scan.image, spots_mm) - spots_mm, axis=1)
    print(f"largest displacement {off_mm.max():.4f} mm")
    assert off_mm.max() < 0.1


def test_water_stays_water_when_a_tilt_is_taken_out(dicom, tmp_path):
    dicom.write(tmp_path, np.full((12, 60, 50), 37.0), dicom.affine(tilt_deg=15))
    found = voxels(read_scan(tmp_path))
    water = found > -1000
    assert np.abs(found[water] - 37).max() < 1e-3
    assert water.sum() == pytest.approx(12 * 60 * 50, rel=0.02)


def test_a_phantom_survives_a_tilt_up_to_interpolation(dicom, tmp_path, phantom):
    """What taking the tilt out adds to the one interpolation by which the phantom was tilted."""
    head = sitk.GetImageFromArray(phantom.clean_ct_hu)
    head.SetSpacing(SPACING_MM[::-1])
    affine = dicom.affine((0.9, 0.9, 5.0), 15, origin_mm=(0, 0, 0))
    tilted = resampled(head, affine, SHAPE)
    dicom.write(tmp_path, tilted, affine)
    scan = read_scan(tmp_path)
    direct = resampled(head, affine_of(scan.image), scan.image.GetSize()[::-1])
    inner = (voxels(scan) > -1000) & (direct > -1000)
    error = np.abs(voxels(scan) - direct)[inner]
    print(f"mean {error.mean():.2f} HU, median {np.median(error):.2f} HU")
    assert np.median(error) < 1


# --- files of other formats -----------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_every_format_reads_as_itk_writes_it(tmp_path, small, ending):
    image = sitk.GetImageFromArray(small)
    image.SetSpacing((9, 9, 12))
    image.SetOrigin((-90, 20, 7))
    image.SetDirection(OBLIQUE.ravel().tolist())
    sitk.WriteImage(image, tmp_path / f"scan{ending}")
    scan = read_scan(tmp_path / f"scan{ending}")
    np.testing.assert_array_equal(voxels(scan), small)
    np.testing.assert_allclose(affine_of(scan.image), affine_of(image), atol=2e-4)
    assert scan.image.GetPixelID() == sitk.sitkFloat32
    assert (scan.modality, scan.patient, scan.notes) == (None, None, ())
    assert scan.source == tmp_path / f"scan{ending}"


def test_a_dicom_file_is_read_whatever_its_name(dicom, tmp_path, small):
    dicom.write(tmp_path, np.rint(small), dicom.affine(), multi_frame=True)
    (file,) = tmp_path.iterdir()
    np.testing.assert_array_equal(voxels(read_scan(str(file.rename(tmp_path / "0001")))),
                                  np.rint(small))  # fmt: skip


@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_nifti_is_placed_where_nibabel_places_it(tmp_path, small, flip):
    affine = ras_affine(small.shape, (12, 9, 9)) @ np.diag([*flip, 1.0])
    nib.save(nib.Nifti1Image(small.T, affine), tmp_path / "scan.nii.gz")
    scan = read_scan(tmp_path / "scan.nii.gz")
    np.testing.assert_allclose(affine_of(scan.image), LPS @ affine, atol=1e-5)
    np.testing.assert_array_equal(voxels(scan), small)


def test_nifti_of_sheared_axes_is_made_upright_with_a_note(dicom, tmp_path):
    affine = dicom.affine((1, 1, 5), tilt_deg=15)
    values = np.full((10, 30, 25), 37, np.float32)
    nib.save(nib.Nifti1Image(values.T, LPS @ affine), tmp_path / "scan.nii")
    scan = read_scan(tmp_path / "scan.nii")
    axes = np.reshape(scan.image.GetDirection(), (3, 3))
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    assert "75.0 degrees apart" in scan.notes[0]
    np.testing.assert_allclose(voxels(scan), 37, rtol=1e-6)


def test_two_templates_of_opposite_x_axes_are_read_into_one_space(shared_data):
    folder = shared_data / "templates_mni_2mm"
    scans = [read_scan(folder / name) for name in ("spm_SPECT.nii", "spm_T2.nii")]
    assert scans[0].image.GetDirection() != scans[1].image.GetDirection()
    spect, t2 = (sitk.DICOMOrient(scan.image, "RAS") for scan in scans)
    assert spect.GetSize() == t2.GetSize()
    assert spect.GetOrigin() == pytest.approx(t2.GetOrigin(), abs=1e-3)


def test_nifti_that_states_no_orientation_gets_a_note(tmp_path, small):
    image = nib.Nifti1Image(small.T, None)
    nib.save(image, tmp_path / "scan.nii")
    assert "states no orientation" in read_scan(tmp_path / "scan.nii").notes[0]


def test_an_sform_elsewhere_than_the_qform_gets_a_note(tmp_path, small):
    image = nib.Nifti1Image(small.T, ras_affine(small.shape, (12, 9, 9)))
    moved = image.affine.copy()
    moved[:3, 3] += (3, 0, 4)
    image.set_sform(moved, 4)
    image.set_qform(image.affine, 1)
    image.set_sform(moved, 4)
    nib.save(image, tmp_path / "scan.nii")
    scan = read_scan(tmp_path / "scan.nii")
    np.testing.assert_allclose(affine_of(scan.image), LPS @ moved, atol=1e-5)


# --- bad input ------------------------------------------------------------------------------------


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        read_scan(tmp_path / "absent.nii.gz")


def test_what_is_no_scan_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("see attached")
    with pytest.raises(ValueError, match=r"expected DICOM or a file in \.nii.*notes\.txt"):
        read_scan(tmp_path / "notes.txt")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("kept", [0.7, 30])
def test_a_truncated_file_is_refused(tmp_path, small, ending, kept):
    path = tmp_path / f"scan{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(small), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"^expected .*got .*scan") as error:
        read_scan(path)
    assert "\n" not in str(error.value)


def claiming(shape, ending, content=b""):
    """A file whose header claims a shape, whatever follows."""
    if ending == ".nii.gz":
        image = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.eye(4))
        image.header.set_data_shape(shape)
        image.header["vox_offset"] = 352
        return gzip.compress(bytes(image.header.binaryblock) + bytes(4) + content)
    sizes = " ".join(map(str, shape))
    if ending == ".mha":
        fields = {
            "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "CompressedData": "True",
            "ElementSpacing": "1 1 1", "DimSize": sizes, "ElementType": "MET_SHORT",
            "ElementDataFile": "LOCAL",
        }  # fmt: skip
        return "".join(f"{k} = {v}\n" for k, v in fields.items()).encode() + zlib.compress(content)
    header = f"NRRD0004\ntype: short\ndimension: 3\nsizes: {sizes}\nspacings: 1 1 1\n"
    return f"{header}endian: little\nencoding: gzip\n\n".encode() + gzip.compress(content)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_small_file_that_claims_an_enormous_volume_is_refused(tmp_path, ending):
    path = tmp_path / f"scan{ending}"
    path.write_bytes(claiming((4, 5, 6), ending, bytes(240)))
    assert read_scan(path).image.GetSize() == (4, 5, 6)  # as an honest one is not
    path.write_bytes(claiming((32767, 32767, 32767), ending))
    with pytest.raises(ValueError, match=f"32767 x 32767 x 32767 voxels, which take .*: {path}"):
        read_scan(path)
    with pytest.raises(ValueError, match=f"expected a volume that fits into .*: {path}"):
        read_image(path)


@pytest.mark.parametrize(
    "fields",
    ["NDims = 100", "NDims : -1", "NDims = 1e3", "NDims =\n100", f"NDims = 3\nName = {'x' * 300}"],
)
def test_a_metaimage_that_would_end_the_process_is_refused(fields, tmp_path):
    """Each of them does end it, in ITK 5.4."""
    path = tmp_path / "scan.mha"
    honest = claiming((4, 5, 6), ".mha", bytes(240))
    path.write_bytes(honest.replace(b"NDims = 3", fields.encode(), 1))
    for read in (read_scan, read_image):
        with pytest.raises(ValueError, match=f"expected (NDims|a header of) .*: {path}"):
            read(path)


def test_a_nifti_that_unpacks_to_more_than_it_says_is_refused(tmp_path):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(claiming((4, 5, 6), ".nii.gz", bytes(50_000_000)))
    with pytest.raises(ValueError, match=f"expected 592 bytes as the header says.*: {path}"):
        read_scan(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_four_dimensions_are_refused(tmp_path, small, ending):
    image = sitk.JoinSeries([sitk.GetImageFromArray(small)] * 2)
    sitk.WriteImage(image, tmp_path / f"scan{ending}")
    with pytest.raises(ValueError, match="expected a 3-D image, got 4-D"):
        read_scan(tmp_path / f"scan{ending}")


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_fourth_axis_of_length_one_is_dropped(tmp_path, small, ending):
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(small)]), tmp_path / f"scan{ending}")
    np.testing.assert_array_equal(voxels(read_scan(tmp_path / f"scan{ending}")), small)


@pytest.mark.parametrize(
    ("mri", "ct", "doubts"), [("MRN-1", "MRN-1", 0), ("MRN-1", "MRN-2", 1), ("MRN-1", "", 0)]
)
def test_an_mri_and_a_ct_of_two_patients_are_doubted_and_not_named(
    dicom, tmp_path, mri, ct, doubts
):
    for name, patient in (("mri", mri), ("ct", ct)):
        dicom.write(
            tmp_path / name, dicom.hounsfield(), dicom.affine(), patient_id=patient,
            patient_name="",
        )  # fmt: skip
    found = mixed_up(read_scan(tmp_path / "mri"), read_scan(tmp_path / "ct"))
    assert len(found) == doubts and "MRN" not in "".join(found)


def test_a_header_in_metres_is_refused(tmp_path, small):
    nib.save(nib.Nifti1Image(small.T, np.diag([0.009, 0.009, 0.012, 1])), tmp_path / "scan.nii")
    with pytest.raises(ValueError, match=r"got a field of view of 0\.22 mm, as of a .* in metres"):
        read_scan(tmp_path / "scan.nii")


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_flat_image_is_refused(tmp_path, small, ending):
    if ending == ".nii.gz":
        nib.save(nib.Nifti1Image(small[0].T, np.eye(4)), tmp_path / "scan.nii.gz")
    else:
        sitk.WriteImage(sitk.GetImageFromArray(small[0]), tmp_path / f"scan{ending}")
    with pytest.raises(ValueError, match="expected a 3-D image, got 2-D"):
        read_scan(tmp_path / f"scan{ending}")


def test_what_a_ct_has_below_air_is_set_to_air_with_a_note(tmp_path, phantom):
    padded = phantom.ct_hu.copy()
    padded[:, :9, :9] = -3024
    paths = tmp_path / "ct.nrrd", tmp_path / "mri.nrrd"
    for path, array in zip(paths, (padded, padded - 5000), strict=True):
        sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.float32)), path)
    ct, other = map(read_scan, paths)
    assert voxels(ct).min() >= -1024 and (voxels(ct)[:, :9, :9] == -1000).all()
    assert any(f"{padded[:, :9, :9].size} voxels below -1024 HU" in note for note in ct.notes)
    np.testing.assert_allclose(voxels(other), padded - 5000)  # in no Hounsfield units


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_colour_is_refused(tmp_path, small, ending):
    colour = sitk.Compose([sitk.GetImageFromArray(small.astype(np.uint8))] * 3)
    path = tmp_path / f"scan{ending}"
    if ending == ".nii.gz":
        rgb = np.zeros(small.T.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
        nib.save(nib.Nifti1Image(rgb, np.eye(4)), path)
    else:
        sitk.WriteImage(colour, path)
    with pytest.raises(ValueError, match=r"expected one (real )?number a voxel"):
        read_scan(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_no_number_are_refused(tmp_path, small, ending, value):
    values = small.copy()
    values[3, 4, 5:7] = value
    sitk.WriteImage(sitk.GetImageFromArray(values), tmp_path / f"scan{ending}")
    with pytest.raises(ValueError, match="got 2 that are NaN or infinite"):
        read_scan(tmp_path / f"scan{ending}")


@pytest.mark.parametrize("code", [0, 1])
def test_nifti_without_a_voxel_size_is_refused(tmp_path, small, code):
    image = nib.Nifti1Image(small.T, np.diag([9.0, 9, 12, 1]))
    nib.save(image, tmp_path / "scan.nii")
    content = bytearray((tmp_path / "scan.nii").read_bytes())
    content[252:256] = np.array([0, code], "<i2").tobytes()  # qform and sform code
    content[80:92] = bytes(12)  # pixdim 1 to 3
    content[280:328] = bytes(48)  # rows of the sform
    (tmp_path / "scan.nii").write_bytes(content)
    with pytest.raises(ValueError, match="expected voxel sizes above zero"):
        read_scan(tmp_path / "scan.nii")


def test_a_metaimage_without_a_voxel_size_is_refused(tmp_path, small):
    sitk.WriteImage(sitk.GetImageFromArray(small), tmp_path / "scan.mhd")
    header = (tmp_path / "scan.mhd").read_text()
    assert "ElementSpacing = 1 1 1" in header
    (tmp_path / "scan.mhd").write_text(header.replace("Spacing = 1 1 1", "Spacing = 1 1 0"))
    with pytest.raises(ValueError, match="expected voxel sizes above zero"):
        read_scan(tmp_path / "scan.mhd")


@pytest.mark.parametrize("turn", [np.diag([-1.0, 1, 1, 1]), np.diag([-1.0, -1, 1, 1])])
def test_nifti_that_contradicts_itself_on_left_and_right_is_refused(tmp_path, small, turn):
    image = nib.Nifti1Image(small.T, ras_affine(small.shape, (12, 9, 9)))
    image.set_qform(image.affine, 1)
    image.set_sform(turn @ image.affine, 1)
    nib.save(image, tmp_path / "scan.nii.gz")
    with pytest.raises(ValueError, match=r"agree on left and right, got (LAS|LPS) and RAS"):
        read_scan(tmp_path / "scan.nii.gz")


def test_a_gzip_of_something_else_is_refused(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(b"not a header"))
    with pytest.raises(ValueError, match="expected a whole NIfTI file"):
        read_scan(tmp_path / "scan.nii.gz")


# --- CT or MRI ------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", ["t1", "t2", "adc"])
@pytest.mark.parametrize("case", range(2))
def test_phantoms_are_told_apart_by_intensities(case, contrast):
    phantom = make_phantom(
        case, seed=5, shape=(16, 48, 48), spacing_mm=(9, 4, 4), contrast=contrast
    )
    ct, mri = (sitk.GetImageFromArray(volume) for volume in (phantom.ct_hu, phantom.mri))
    assert (looks_like_ct(ct), looks_like_ct(mri)) == (True, False)
    ct, mri = (Scan(image, Path(name)) for image, name in ((ct, "ct"), (mri, "mri")))
    check_not_swapped(mri, ct)
    with pytest.raises(ValueError, match=r"expected mri=.*mri and ct=.*ct, got them swapped"):
        check_not_swapped(mri=ct, ct=mri)
    with pytest.raises(ValueError, match="expected an MRI, got a CT by its intensities"):
        check_not_swapped(mri=ct, ct=ct)
    with pytest.raises(ValueError, match="expected a CT, got an MRI by its intensities"):
        check_not_swapped(mri=mri, ct=mri)


def test_intensities_do_not_tell_where_ct_was_windowed_scaled_or_offset(phantom):
    window = np.clip((phantom.ct_hu + 60) / 200 * 255, 0, 255)
    for ct in (np.rint(window), window / 255, np.rint(phantom.ct_hu) + 1024):
        assert looks_like_ct(sitk.GetImageFromArray(ct.astype(np.float32))) is None


def test_what_the_files_say_counts_more_than_intensities(dicom, tmp_path, phantom):
    for modality in ("CT", "MR"):  # an 8-bit window, which alone would pass for either
        dicom.write(
            tmp_path / modality, np.rint(np.clip(phantom.ct_hu, 0, 255))[:, ::3, ::3],
            dicom.affine((2.7, 2.7, 5)), modality=modality,
        )  # fmt: skip
    mri, ct = read_scan(tmp_path / "MR"), read_scan(tmp_path / "CT")
    check_not_swapped(mri, ct)
    with pytest.raises(ValueError, match="got them swapped"):
        check_not_swapped(mri=ct, ct=mri)


def test_real_windowed_pairs_raise_no_false_alarm_and_real_hu_is_known(shared_data):
    for folder in sorted((shared_data / "harvard_studies").glob("case_*")):
        check_not_swapped(read_scan(folder / "mri.nii.gz"), read_scan(folder / "ct.nii.gz"))
    templates = shared_data / "templates_mni_2mm"
    ct = read_scan(templates / "scct_hu.nii.gz")
    mri = read_scan(templates / "MNI152_T1_2mm.nii.gz")
    assert (looks_like_ct(ct.image), looks_like_ct(mri.image)) == (True, False)
    with pytest.raises(ValueError, match="swapped"):
        check_not_swapped(mri=ct, ct=mri)
    for name in ("adc", "dwi", "flair"):
        (file,) = (shared_data / "isles22_case").glob(f"*_{name}.nii.gz")
        assert looks_like_ct(read_scan(file).image) is False


@pytest.mark.parametrize("value", [np.float32(3e38), np.float32(1e-44)])
def test_an_affine_that_no_arithmetic_survives_is_refused_by_name(value, tmp_path):
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6), np.int16), np.diag([2.0, 2, 4, 1])), path)
    content = bytearray(path.read_bytes())
    for place in (280, 300, 316):  # of the sform
        content[place : place + 4] = value.tobytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"expected .*: {path}") as caught:
        read_scan(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["di", "dimension: ", "a b: ", ": :="])
def test_a_field_of_nrrd_that_would_end_the_process_is_refused(field, tmp_path):
    """On such a line ITK writes beyond its memory."""
    path = tmp_path / "ct.nrrd"
    path.write_bytes(b"NRRD0004\ntype: short\n" + field.encode() + b"[" * 20_000 + b"\n\n")
    with pytest.raises(ValueError, match="expected fields of less than 500 characters") as refused:
        read_scan(path)
    assert str(path) in str(refused.value)


def test_long_remarks_in_nrrd_are_read(tmp_path):
    path = tmp_path / "ct.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6), np.int16)), path)
    magic, rest = path.read_bytes().split(b"\n", 1)
    remarks = b"#" + b"x" * 2000 + b"\nnote:=" + b"y" * 2000 + b"\n"
    path.write_bytes(magic + b"\n" + remarks + rest)
    assert read_scan(path).image.GetSize() == (6, 5, 4)
