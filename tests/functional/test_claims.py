import gzip
import struct
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinfuse.functional.claims import (
    MORE_BYTES,
    MOST_TEXT_BYTES,
    check_room,
    check_texts,
    unpacked,
)


def test_a_volume_is_refused_where_it_does_not_fit_into_what_is_free(tmp_path):
    check_room((256, 256, 1), 2, tmp_path)
    slices = psutil.virtual_memory().total // (512 * 512 * 10) + 1
    with pytest.raises(ValueError, match=rf"got 512 x 512 x {slices} voxels, .*: {tmp_path}"):
        check_room((512, 512, slices), 2, tmp_path)


OFFSET = {nib.Nifti1Image: (108, "f"), nib.Nifti2Image: (168, "q")}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", OFFSET)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_voxels_that_begin_far_behind_the_header_are_refused_before_it_is_opened(
    order, kind, ending, tmp_path
):
    image = kind(np.zeros((2, 3, 4), np.int16), np.eye(4), kind.header_class(endianness=order))
    place, code = OFFSET[kind]
    path, content = tmp_path / f"a{ending}", bytearray(image.to_bytes())
    begins = {"f": (1e9, float("nan"), float("inf")), "q": (1 << 40,)}[code]
    for begin in (MOST_TEXT_BYTES, *begins):
        struct.pack_into(f"{order}{code}", content, place, begin)
        path.write_bytes(gzip.compress(bytes(content)) if ending == ".nii.gz" else content)
        if begin == MOST_TEXT_BYTES:
            check_texts(path)
            continue
        with pytest.raises(ValueError, match=f"expected voxels after at most .*: {path}"):
            check_texts(path)


def test_what_is_no_nifti_is_left_to_others(tmp_path):
    for content in (b"", b"abc", bytes(600), b"\xff" * 600):
        (tmp_path / "a.nii").write_bytes(content)
        check_texts(tmp_path / "a.nii")


@given(members=st.lists(st.binary(max_size=300), min_size=1, max_size=3), zeros=st.integers(0, 3))
def test_what_is_unpacked_is_what_gzip_unpacks(members, zeros, tmp_path_factory):
    path = tmp_path_factory.mktemp("gzip") / "a.gz"
    path.write_bytes(b"".join(gzip.compress(member) + bytes(zeros) for member in members))
    assert unpacked(path, 0) == gzip.decompress(path.read_bytes()) == b"".join(members)


def test_what_is_cut_or_damaged_is_not_unpacked(tmp_path):
    whole, path = gzip.compress(bytes(range(256)) * 40), tmp_path / "a.gz"
    for kept in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[: kept + 1])
        with pytest.raises(EOFError):
            unpacked(path, 10_240)
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    with pytest.raises(zlib.error):
        unpacked(path, 10_240)


@pytest.mark.parametrize("members", [1, 200])
def test_what_unpacks_to_more_than_it_says_is_stopped_soon_behind_that(members, tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(200_000_000 // members)) * members)
    assert path.stat().st_size < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"expected 1000 bytes as the header says.*{path}"):
            unpacked(path, 1000)
        assert tracemalloc.get_traced_memory()[1] < 4 * MORE_BYTES
    finally:
        tracemalloc.stop()
