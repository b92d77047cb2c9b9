import numpy as np
import pytest
from PIL import Image

from clinfuse.data.paired_slices import PairedSlices
from clinfuse.data.phantom_slices import CT_WINDOW_HU, ct_bytes, spect_bytes, write_slices
from clinfuse.data.phantoms import make_phantom


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A grey and a colour set of seven patients, their pictures of odd size."""
    folder = tmp_path_factory.mktemp("sets")
    for kind in ("ct_mri", "spect_mri"):
        write_slices(folder / kind, kind, patients=7, slices=2, shape=(49, 43))
    return folder


@pytest.mark.parametrize("kind", ["ct_mri", "spect_mri"])
def test_a_set_is_read_as_pairs_split_by_patient(sets, kind):
    data = PairedSlices(sets / kind, kind)
    assert len(data.pairs) == 14
    lists = [{data.patients[name] for name in data.splits[split]} for split in data.splits]
    assert sum(map(len, lists)) == 7 and set.union(*lists) == set("1234567")
    batch = next(iter(data.test_dataloader()[0]))
    assert batch.mri.shape == batch.ct.shape == (1, 1, 49, 43)
    assert (batch.chroma is None) == (kind == "ct_mri")
    if kind == "ct_mri":
        assert batch.brain.any() and batch.bone.any()  # segmented in the CT, so it looks like one
    else:
        assert batch.chroma.abs().max() > 0.1


def test_rows_run_from_front_to_back_and_ct_is_windowed(sets):
    phantom = make_phantom(0, 0, (4, 49, 43), (30.0, 230 / 49, 230 / 49), "t2")
    picture = np.asarray(Image.open(sets / "ct_mri" / "CT" / "1000.png"))
    low, high = CT_WINDOW_HU
    expected = (phantom.ct_hu[1].clip(low, high) - low) / (high - low) * 255
    np.testing.assert_allclose(picture, expected[::-1], atol=0.51)


def test_infarcts_take_up_less(sets):
    for case in range(9):
        phantom = make_phantom(case, shape=(8, 64, 64), spacing_mm=(15.0, 3.6, 3.6))
        if phantom.lesion.sum() > 20:
            break
    uptake = spect_bytes(phantom).mean(-1)
    assert uptake[phantom.lesion].mean() < 0.9 * uptake[phantom.brain & ~phantom.lesion].mean()
    assert (
        uptake[ct_bytes(phantom) == 0].mean() < 5
    )  # air is dark, but for the blur around the brain


def test_a_set_that_is_there_is_left_alone_and_a_wrong_wish_is_refused(sets, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (sets / "ct_mri").rglob("*")}
    write_slices(sets / "ct_mri", "ct_mri", patients=7, slices=2, shape=(49, 43))
    assert before == {path: path.stat().st_mtime_ns for path in (sets / "ct_mri").rglob("*")}
    with pytest.raises(ValueError, match="expected a kind of ct_mri, spect_mri, got 'pet_mri'"):
        write_slices(tmp_path / "new", "pet_mri", patients=1)
    with pytest.raises(ValueError, match="expected 1 to 99 patients, got 100"):
        write_slices(tmp_path / "new", "ct_mri", patients=100)
    assert not any(tmp_path.iterdir())
