import gzip
import itertools
import logging

import nibabel as nib
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from clinfuse.data.volumes import (
    check_one_grid,
    read_grid,
    read_volume,
    resize,
    resized_shape,
    write_volume,
)

AFFINE = np.array([[2.0, 0, 0, -11], [0, 3, 0, -17], [0, 0, 4, -23], [0, 0, 0, 1]])
ORIENTATIONS = [
    "".join(axis[side] for axis, side in zip(axes, sides, strict=True))
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for sides in itertools.product((0, 1), repeat=3)
]


def values(shape=(5, 6, 7)):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def save(path, data, affine=AFFINE):
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_storage_order_reads_alike_and_is_written_back_as_it_was(tmp_path, orientation):
    canonical = nib.Nifti1Image(values(), AFFINE)
    turn = ornt_transform(io_orientation(AFFINE), axcodes2ornt(orientation))
    stored = canonical.as_reoriented(turn)
    nib.save(stored, tmp_path / "stored.nii.gz")

    volume = read_volume(tmp_path / "stored.nii.gz")
    assert volume.grid.orientation == orientation
    np.testing.assert_array_equal(volume.array, values().transpose(2, 1, 0))
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert volume.spacing_mm == (4.0, 3.0, 2.0)
    assert volume.grid.shape_dhw == volume.array.shape
    grid = read_grid(tmp_path / "stored.nii.gz")
    assert grid.shape == volume.grid.shape and grid.header == volume.grid.header
    np.testing.assert_array_equal(grid.affine, volume.grid.affine)

    write_volume(tmp_path / "back.nii.gz", volume.array, like=volume)
    back = nib.load(tmp_path / "back.nii.gz")
    np.testing.assert_array_equal(back.get_fdata(), stored.get_fdata())
    np.testing.assert_allclose(back.affine, stored.affine)


def test_tensor_axes_grow_to_superior_anterior_and_right(tmp_path):
    data = np.zeros((5, 6, 7), np.float32)
    flipped = np.diag([-2.0, -3, 4, 1])  # stored axes point left, posterior, superior
    data[0, 0, 6] = 1  # so this corner is right, anterior, superior
    assert read_volume(save(tmp_path / "v.nii", data, flipped)).array[-1, -1, -1] == 1


def test_an_oblique_scan_keeps_its_affine_when_written_back(tmp_path):
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    oblique = turn @ np.diag([-2.0, 3, 4, 1])
    volume = read_volume(save(tmp_path / "v.nii.gz", values(), oblique))
    assert volume.spacing_mm == pytest.approx((4, 3, 2))
    write_volume(tmp_path / "w.nii.gz", volume.array, like=volume)
    np.testing.assert_allclose(nib.load(tmp_path / "w.nii.gz").affine, oblique, atol=1e-6)
    np.testing.assert_array_equal(nib.load(tmp_path / "w.nii.gz").get_fdata(), values())


def test_scans_of_opposite_x_axes_land_on_one_grid(shared_data):
    folder = shared_data / "templates_mni_2mm"
    if not folder.is_dir():
        pytest.skip(f"no templates at {folder}")
    spect, t2 = (read_volume(folder / name) for name in ("spm_SPECT.nii", "spm_T2.nii"))
    assert spect.grid.orientation != t2.grid.orientation
    check_one_grid(spect, t2)
    for volume in (spect, t2):  # the same millimetres, looked up in the file by nibabel
        image = nib.load(volume.path)
        for x, y, z in np.random.default_rng(0).integers(0, (91, 109, 91), (50, 3)):
            i, j, k, _ = np.linalg.solve(image.affine, volume.affine @ (x, y, z, 1)).round()
            stored = np.asarray(image.dataobj)[int(i), int(j), int(k)]
            assert volume.array[z, y, x] == pytest.approx(float(stored))


def test_scaled_integers_come_back_as_values_not_as_stored_numbers(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), AFFINE)
    image.header.set_slope_inter(2.0, -1000.0)
    nib.save(image, tmp_path / "ct.nii.gz")
    volume = read_volume(tmp_path / "ct.nii.gz")
    stored = nib.load(tmp_path / "ct.nii.gz").get_fdata()
    np.testing.assert_allclose(volume.array, stored.transpose(2, 1, 0))
    write_volume(tmp_path / "back.nii.gz", volume.array / 3, like=volume)
    np.testing.assert_allclose(
        nib.load(tmp_path / "back.nii.gz").get_fdata(), stored / 3, rtol=1e-6
    )


def test_a_mask_is_stored_in_bytes(tmp_path):
    volume = read_volume(save(tmp_path / "v.nii.gz", values()))
    write_volume(tmp_path / "mask.nii.gz", volume.array > 0, like=volume)
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(mask.dataobj), values() > 0)


def test_a_trailing_axis_of_one_is_still_a_volume(tmp_path):
    volume = read_volume(save(tmp_path / "v.nii.gz", values()[..., None]))
    np.testing.assert_array_equal(volume.array, values().transpose(2, 1, 0))


def refused(path, *words):
    with pytest.raises(ValueError) as error:
        read_volume(path)
    message = str(error.value)
    assert "\n" not in message and "expected" in message and str(path) in message
    for word in words:
        assert word in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "mri.nii.gz")):
        read_volume(tmp_path / "mri.nii.gz")


@pytest.mark.parametrize("kept", [10, 100, 380, -200, -4])
def test_a_truncated_gzip_is_refused(tmp_path, kept):
    path = save(tmp_path / "mri.nii.gz", values((20, 20, 20)))
    path.write_bytes(path.read_bytes()[:kept])
    refused(path)


@pytest.mark.parametrize("kept", [0, 100, 360, -4])
def test_a_truncated_uncompressed_file_is_refused(tmp_path, kept):
    path = save(tmp_path / "mri.nii", values((20, 20, 20)))
    path.write_bytes(path.read_bytes()[:kept])
    refused(path)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9, 0.9999])
def test_a_gzip_with_flipped_bits_is_refused(tmp_path, place):
    path = save(tmp_path / "mri.nii.gz", values((20, 20, 20)))
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0xFF
    path.write_bytes(bytes(content))
    refused(path)


def claiming(shape, content=b"", **fields):
    """A NIfTI file whose header claims a shape, whatever follows."""
    image = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), AFFINE)
    image.header.set_data_shape(shape)
    for name, value in fields.items():
        image.header[name] = value
    return bytes(image.header.binaryblock) + bytes(4) + content


def test_a_small_file_that_claims_or_unpacks_to_an_enormous_volume_is_refused(tmp_path):
    huge = (32767, 32767, 32767)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(claiming(huge, vox_offset=352)))
    refused(tmp_path / "a.nii.gz", "fits into", "32767 x 32767 x 32767 voxels, which take 3.52e+05")
    with (tmp_path / "b.nii").open("wb") as file:  # as long as it says, and with nothing in it
        slices = psutil.virtual_memory().total // (10 * 32767**2) + 1
        file.write(claiming((32767, 32767, slices), vox_offset=352))
        file.truncate(352 + 2 * 32767**2 * slices)
    refused(tmp_path / "b.nii", "fits into")
    packed = gzip.compress(claiming((2, 3, 4), bytes(50_000_000), vox_offset=352))
    (tmp_path / "c.nii.gz").write_bytes(packed)
    refused(tmp_path / "c.nii.gz", "expected 400 bytes as the header says")
    (tmp_path / "d.nii.gz").write_bytes(gzip.compress(claiming((2, 3, 4), vox_offset=1e9)))
    refused(tmp_path / "d.nii.gz", "expected voxels after at most")


def test_what_a_writer_left_behind_the_voxels_is_passed_over(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(nib.Nifti1Image(values(), AFFINE).to_bytes() + bytes(512)))
    np.testing.assert_array_equal(read_volume(path).array, values().transpose(2, 1, 0))


def test_what_is_not_nifti_is_refused(tmp_path):
    for name, content in (
        ("a.nii.gz", b"not even gzip"),
        ("b.nii.gz", gzip.compress(b"text " * 200)),
        ("c.nii", b"text " * 200),
        ("d.png", b"\x89PNG" + bytes(500)),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "NIfTI")


def test_an_image_of_another_format_is_refused(tmp_path):
    nib.save(nib.MGHImage(values(), AFFINE), tmp_path / "a.mgz")
    refused(tmp_path / "a.mgz", "NIfTI", "MGHImage")


@pytest.mark.parametrize("shape", [(4, 5, 6, 2), (4, 5), (4, 5, 6, 1, 3)])
def test_what_is_not_a_volume_is_refused_with_its_shape(tmp_path, shape):
    refused(save(tmp_path / "a.nii.gz", values(shape)), "3-D", str(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_voxels_that_are_not_numbers_are_counted(tmp_path, bad):
    data = values()
    data[1, 2, :3] = bad
    refused(save(tmp_path / "a.nii.gz", data), "finite", "3 ")


def test_colour_and_complex_voxels_are_refused(tmp_path):
    colour = np.zeros((3, 4, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(save(tmp_path / "rgb.nii.gz", colour), "real number")
    refused(save(tmp_path / "complex.nii.gz", values().astype(np.complex64)), "real number")


def test_an_affine_without_volume_is_refused(tmp_path):
    image = nib.Nifti1Image(values(), AFFINE)
    image.header["sform_code"], image.header["qform_code"] = 1, 0
    image.header["srow_x"] = 0
    path = tmp_path / "flat.nii"
    nib.save(image, path)
    content = bytearray(path.read_bytes())
    content[280:296] = bytes(16)  # srow_x, which nibabel's writer had filled from the affine
    path.write_bytes(bytes(content))
    refused(path, "invertible affine")


PIXDIM = {"nii": (80, "<f4"), "2.nii": (112, "<f8")}
"""Where the voxel size along i lies in a NIfTI-1 and in a NIfTI-2 header."""


@pytest.mark.parametrize("size_mm", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("version", PIXDIM)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_voxel_size_of_nothing_is_refused_even_beside_a_good_affine(
    tmp_path, size_mm, version, suffix
):
    image = {"nii": nib.Nifti1Image, "2.nii": nib.Nifti2Image}[version](values(), AFFINE)
    at, kind = PIXDIM[version]
    content = bytearray(image.to_bytes())
    assert np.frombuffer(content, kind, 3, at).tolist() == [2, 3, 4]
    content[at : at + np.dtype(kind).itemsize] = np.array(size_mm, kind).tobytes()
    path = tmp_path / f"mri.{version}{suffix}"
    path.write_bytes(gzip.compress(bytes(content)) if suffix else bytes(content))
    assert nib.load(path).affine[0, 0] == 2  # nibabel takes it
    refused(path, "voxel sizes above zero", f"[{size_mm}, 3.0, 4.0] mm")


def test_a_file_that_states_no_orientation_is_warned_about(tmp_path, caplog):
    image = nib.Nifti1Image(values(), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(image, tmp_path / "a.nii.gz")
    with caplog.at_level(logging.WARNING):
        read_volume(tmp_path / "a.nii.gz")
    assert "states no orientation" in caplog.text


def test_texts_and_extensions_of_a_header_are_not_passed_on(tmp_path):
    image = nib.Nifti1Image(values(), AFFINE)
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[field] = b"Doe^Jane"
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"Doe^Jane, MRN-0042"))
    nib.save(image, tmp_path / "given.nii")
    volume = read_volume(tmp_path / "given.nii")
    write_volume(tmp_path / "written.nii", volume.array, like=volume)
    assert b"Doe" in (tmp_path / "given.nii").read_bytes()
    assert b"Doe" not in (tmp_path / "written.nii").read_bytes()
    np.testing.assert_array_equal(read_volume(tmp_path / "written.nii").array, volume.array)


@given(data=st.data())
def test_a_changed_file_is_read_or_refused_in_one_sentence_that_names_it(data, tmp_path_factory):
    path = save(tmp_path_factory.mktemp("changed") / "a.nii", values((2, 3, 4)))
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, 351), min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        assert np.isfinite(read_volume(path).array).all()
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_an_array_of_another_size_is_not_written(tmp_path):
    volume = read_volume(save(tmp_path / "v.nii.gz", values()))
    with pytest.raises(ValueError, match=r"\(7, 6, 5\)"):
        write_volume(tmp_path / "w.nii.gz", volume.array[1:], like=volume)
    assert [p.name for p in tmp_path.iterdir()] == ["v.nii.gz"]


def test_writing_leaves_nothing_else_behind_and_replaces_whole_files(tmp_path):
    volume = read_volume(save(tmp_path / "v.nii.gz", values()))
    write_volume(tmp_path / "new" / "w.nii.gz", volume.array, like=volume)
    write_volume(tmp_path / "new" / "w.nii.gz", -volume.array, like=volume)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["w.nii.gz"]
    np.testing.assert_array_equal(read_volume(tmp_path / "new/w.nii.gz").array, -volume.array)


def test_grids_that_differ_are_refused_with_both_affines(tmp_path):
    moved = AFFINE.copy()
    moved[0, 3] += 1.0
    a = read_volume(save(tmp_path / "mri.nii.gz", values()))
    b = read_volume(save(tmp_path / "ct.nii.gz", values(), moved))
    with pytest.raises(ValueError) as error:
        check_one_grid(a, b)
    message = str(error.value)
    assert "mri.nii.gz" in message and "ct.nii.gz" in message
    assert "-11.0" in message and "-10.0" in message and "\n" not in message


def test_grids_of_other_sizes_are_refused(tmp_path):
    a = read_volume(save(tmp_path / "mri.nii.gz", values()))
    b = read_volume(save(tmp_path / "ct.nii.gz", values((5, 6, 8))))
    with pytest.raises(ValueError, match=r"\(5, 6, 7\).*\(5, 6, 8\)"):
        check_one_grid(a, b)


def test_header_rounding_and_storage_order_do_not_make_two_grids(tmp_path):
    a = read_volume(save(tmp_path / "mri.nii.gz", values()))
    image = nib.Nifti1Image(values(), AFFINE + 1e-4 * np.eye(4))
    image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("SLP")))
    nib.save(image, tmp_path / "ct.nii.gz")
    check_one_grid(a, read_volume(tmp_path / "ct.nii.gz"))


def test_resizing_keeps_positions_in_millimetres(tmp_path):
    volume = read_volume(save(tmp_path / "v.nii.gz", values((40, 30, 20))))
    assert resized_shape(volume, (8.0, 3.0, 1.0)) == (10, 30, 80)
    position = np.arange(20.0) + 0.5  # of voxel centres from the edge, in voxels
    ramp = np.broadcast_to(position[:, None, None], (20, 30, 40)).astype(np.float32)
    coarse = resize(ramp, (10, 30, 80))
    np.testing.assert_allclose(coarse[1:-1, 4, 5], (np.arange(10) + 0.5)[1:-1] * 2, atol=0.02)


def test_resizing_to_coarse_voxels_averages_instead_of_picking():
    stripes = np.zeros((4, 4, 64), np.float32)
    stripes[..., ::4] = 4.0  # mean 1, and every fourth voxel carries all of it
    coarse = resize(stripes, (4, 4, 16))
    np.testing.assert_allclose(coarse[..., 1:-1], 1.0, atol=0.35)


def test_resampling_sizes_must_be_positive(tmp_path):
    volume = read_volume(save(tmp_path / "v.nii.gz", values()))
    with pytest.raises(ValueError, match="three positive voxel sizes"):
        resized_shape(volume, (1.0, 0.0, 1.0))
