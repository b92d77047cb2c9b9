import numpy as np
import pytest
import torch
import torchio as tio
from scipy.spatial.transform import Rotation
from scipy.stats import kstest

from clinfuse.data.jitter import (
    RegistrationJitter,
    about_another_centre,
    fixed_misregistration,
    move,
    move_mask,
)
from clinfuse.functional.warp import rigid_displacement, warp

SPACING_MM = (4.0, 2.0, 3.0)
SHAPE = (24, 44, 36)
BLOBS = ((1.0, (9.0, -12.0, 16.0), 13.0), (0.7, (-14.0, 9.0, -8.0), 11.0))
INSIDE = (slice(None), *(slice(5, -5),) * 3)

INTERPOLATION_ERROR = sum(h**2 / 8 / 13**2 for h in SPACING_MM)
"""Of linear interpolation: h² max|f''| / 8 along each axis, with f'' up to 1 / 13² per mm²."""


def positions_mm(shape=SHAPE):
    axes = [(torch.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, SPACING_MM, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).double()


def blobs(points_mm):
    """A smooth scene known at every point, not only on voxels."""
    parts = (
        height * torch.exp(-(points_mm - torch.tensor(c).double()).square().sum(-1) / (2 * w**2))
        for height, c, w in BLOBS
    )
    return sum(parts).float()[None]


def draws(jitter, n=4000):
    generator = torch.Generator().manual_seed(1)
    return torch.stack([jitter.draw(generator) for _ in range(n)])


MATRICES = {
    "fixed": fixed_misregistration("case_07", 6.0, 8.0),
    "jitter": RegistrationJitter(5, 7, 1).draw(torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_what_lay_at_p_lies_at_a_p(matrix):
    back = torch.linalg.inv(matrix)
    expected = blobs(positions_mm() @ back[:3, :3].T + back[:3, 3])
    moved = move(blobs(positions_mm()), matrix, SPACING_MM, fill=0.0)
    assert (blobs(positions_mm()) - expected)[INSIDE].abs().max() > 0.15  # it moved,
    assert (moved - expected)[INSIDE].abs().max() < INTERPOLATION_ERROR  # and there


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_the_recorded_displacement_warps_the_moved_ct_back(matrix):
    clean = blobs(positions_mm())
    moved = move(clean, matrix, SPACING_MM, fill=0.0)
    displacement = rigid_displacement(matrix[None].float(), SHAPE, SPACING_MM)
    restored = warp(moved[None], displacement, SPACING_MM)[0]
    assert (restored - clean)[INSIDE].abs().max() < 2 * INTERPOLATION_ERROR


def test_a_whole_voxel_shift_is_exact():
    volume = torch.rand(1, *SHAPE)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, 3] = torch.tensor([4.0, -4.0, 6.0])  # 1, -2 and 2 voxels
    moved = move(volume, matrix, SPACING_MM)
    torch.testing.assert_close(moved[:, 1:, :-2, 2:], volume[:, :-1, 2:, :-2], atol=1e-5, rtol=0)
    assert (moved[:, 0] == -1).all() and (moved[:, :, -1] == -1).all()  # air comes in


def test_torchios_own_random_affine_moves_alike_for_the_parameters_it_recorded():
    volume = blobs(positions_mm())
    image = tio.ScalarImage(tensor=volume, affine=np.diag([*SPACING_MM, 1.0]))
    torch.manual_seed(3)
    random = tio.RandomAffine(scales=0, degrees=9, translation=5, default_pad_value=-1.0)
    theirs = random(tio.Subject(ct=image))
    recorded = theirs.history[0]
    x, y, z = np.radians(recorded.degrees)
    about = {  # right-handed turns about the first, second and third axis
        "first": [[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]],
        "second": [[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]],
        "third": [[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]],
    }
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(about["third"]) @ about["first"] @ about["second"]
    matrix[:3, 3] = recorded.translation
    ours = move(volume, torch.from_numpy(matrix), SPACING_MM, interpolation="linear")
    torch.testing.assert_close(ours, theirs.ct.data, atol=1e-5, rtol=0)


def test_a_similarity_grows_what_it_moves():
    matrix = MATRICES["fixed"].clone()
    matrix[:3, :3] *= 1.1
    back = torch.linalg.inv(matrix)
    expected = blobs(positions_mm() @ back[:3, :3].T + back[:3, 3])
    moved = move(blobs(positions_mm()), matrix, SPACING_MM, fill=0.0)
    assert (moved - expected)[INSIDE].abs().max() < INTERPOLATION_ERROR


def test_a_mask_moves_with_its_image():
    inside = blobs(positions_mm()) > 0.2
    moved = move_mask(inside, MATRICES["fixed"], SPACING_MM)
    back = torch.linalg.inv(MATRICES["fixed"])
    truth = blobs(positions_mm() @ back[:3, :3].T + back[:3, 3]) > 0.2
    overlap = 2 * (moved & truth).sum() / (moved.sum() + truth.sum())
    stayed = 2 * (inside & truth).sum() / (inside.sum() + truth.sum())
    assert overlap > 0.95 > stayed + 0.1


def test_no_movement_changes_no_voxel():
    volume = torch.rand(1, *SHAPE)
    assert move(volume, torch.eye(4, dtype=torch.float64), SPACING_MM) is volume


def test_jitter_has_the_amplitude_and_the_frequency_that_were_asked_for():
    matrices = draws(RegistrationJitter(max_mm=2.0, max_deg=3.0, probability=0.4))
    moved = (matrices - torch.eye(4, dtype=torch.float64)).flatten(1).any(1)
    # 4000 coins of 0.4: four standard errors are 0.031
    assert moved.double().mean() == pytest.approx(0.4, abs=0.031)
    matrices = matrices[moved].numpy()
    for axis in range(3):
        shift = matrices[:, axis, 3]
        assert kstest(shift, "uniform", (-2, 4)).pvalue > 1e-3
    about_first = np.degrees(np.arcsin(matrices[:, 2, 1]))  # the middle turn of Z, X, Y
    assert kstest(about_first, "uniform", (-3, 6)).pvalue > 1e-3
    about_third = np.degrees(np.arctan2(-matrices[:, 0, 1], matrices[:, 1, 1]))
    assert kstest(about_third, "uniform", (-3, 6)).pvalue > 1e-3
    about_second = np.degrees(np.arctan2(-matrices[:, 2, 0], matrices[:, 2, 2]))
    assert kstest(about_second, "uniform", (-3, 6)).pvalue > 1e-3


def test_jitter_is_rigid():
    linear = draws(RegistrationJitter(2, 10, 1), 50)[:, :3, :3]
    identity = torch.eye(3, dtype=torch.float64).expand_as(linear)
    torch.testing.assert_close(linear @ linear.mT, identity)
    torch.testing.assert_close(torch.linalg.det(linear), torch.ones(50, dtype=torch.float64))


def test_later_numbers_do_not_depend_on_whether_a_draw_moves():
    never, always = (torch.Generator().manual_seed(5) for _ in range(2))
    RegistrationJitter(probability=0).draw(never)
    RegistrationJitter(probability=1).draw(always)
    assert torch.equal(torch.rand(3, generator=never), torch.rand(3, generator=always))


@pytest.mark.parametrize("arguments", [(-1, 2, 0.5), (2, -1, 0.5), (2, 2, 1.5)])
def test_impossible_jitter_is_refused(arguments):
    with pytest.raises(ValueError, match="expected max_mm"):
        RegistrationJitter(*arguments)


@pytest.mark.parametrize("amplitude", [0.0, 1.0, 4.0])
def test_fixed_misregistration_has_exactly_the_amplitude(amplitude):
    matrix = fixed_misregistration("case_03", amplitude, 2 * amplitude)
    assert float(matrix[:3, 3].norm()) == pytest.approx(amplitude)
    cosine = (float(matrix[:3, :3].trace()) - 1) / 2
    assert np.degrees(np.arccos(min(cosine, 1.0))) == pytest.approx(2 * amplitude, abs=1e-5)


def test_fixed_misregistration_keeps_its_direction_over_amplitudes():
    small, large = (fixed_misregistration("case_03", mm, mm)[:3] for mm in (1.0, 3.0))
    torch.testing.assert_close(3 * small[:, 3], large[:, 3])
    skew = [m[:, :3] - m[:, :3].T for m in (small, large)]
    axes = [torch.stack((s[2, 1], s[0, 2], s[1, 0])) for s in skew]
    torch.testing.assert_close(*(axis / axis.norm() for axis in axes))


def test_fixed_misregistration_points_everywhere_and_differs_between_cases_and_seeds():
    shifts = torch.stack([fixed_misregistration(f"case_{i}", 1.0, 1.0)[:3, 3] for i in range(500)])
    assert shifts.mean(0).norm() < 0.12  # 500 unit vectors: r.m.s. 1 / sqrt(500) = 0.045
    assert shifts.square().mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.06)
    assert not torch.equal(
        fixed_misregistration("a", 1.0, 1.0, seed=0), fixed_misregistration("a", 1.0, 1.0, seed=1)
    )


def test_a_movement_about_another_centre_is_the_same_movement():
    matrix, centre_mm = MATRICES["jitter"], torch.tensor([12.0, -30.0, 7.0], dtype=torch.float64)
    points_mm = torch.randn(20, 3, dtype=torch.float64) * 40
    moved = points_mm @ matrix[:3, :3].T + matrix[:3, 3]
    local = about_another_centre(matrix, centre_mm)
    again = (points_mm - centre_mm) @ local[:3, :3].T + local[:3, 3] + centre_mm
    torch.testing.assert_close(again, moved)


PLACES_MM = ((0.0, 0.0, 0.0), (0.0, 48.0, 0.0), (0.0, 0.0, -48.0))
"""Of three spots: at the grid's centre, in front of it and beside it."""


def spots(spacing_mm):
    """Where the voxels lie, and spots of 5 mm s.d. at three places, on a grid of 90 x 150² mm."""
    sizes = [round(mm / size) for mm, size in zip((90, 150, 150), spacing_mm, strict=True)]
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(sizes, spacing_mm, strict=True)]
    points_mm = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    squares = [((points_mm - place) ** 2).sum(-1) for place in PLACES_MM]
    return points_mm, torch.from_numpy(sum(np.exp(-s / 50) for s in squares)).float()[None]


def seen_motion(points_mm, moved):
    """Shift and rotation of the spots, from the centroid of what is bright near each of them."""
    bright = moved[0].double().numpy().clip(min=0)
    near = [np.linalg.norm(points_mm - place, axis=-1) < 24 for place in PLACES_MM]
    centre, *others = [np.average(points_mm[n], axis=0, weights=bright[n]) for n in near]
    arms = [other - centre for other in others]
    return centre, Rotation.align_vectors(arms, PLACES_MM[1:])[0]


@pytest.mark.parametrize("spacing_mm", [(5.0, 0.9, 0.9), (4.0, 4.0, 4.0)])
@pytest.mark.parametrize("amplitude", [1.0, 4.0])
def test_spots_are_seen_to_move_by_the_millimetres_and_degrees_stated(spacing_mm, amplitude):
    points_mm, volume = spots(spacing_mm)
    for case in ("case_00", "case_01", "case_02"):
        matrix = fixed_misregistration(case, amplitude, amplitude)
        shift_mm, rotation = seen_motion(points_mm, move(volume, matrix, spacing_mm, fill=0.0))
        # a centroid's error: where a spot's tails leave what is near, 4 mm further out
        assert np.linalg.norm(shift_mm) == pytest.approx(amplitude, abs=0.03)
        assert np.degrees(rotation.magnitude()) == pytest.approx(amplitude, abs=0.05)


@pytest.mark.parametrize("spacing_mm", [(5.0, 0.9, 0.9), (4.0, 4.0, 4.0)])
def test_jitter_is_seen_to_fill_its_range_along_every_axis_and_not_to_leave_it(spacing_mm):
    points_mm, volume = spots(spacing_mm)
    generator, jitter = torch.Generator().manual_seed(0), RegistrationJitter(3.0, 2.0, 1.0)
    seen = [
        seen_motion(points_mm, move(volume, jitter.draw(generator), spacing_mm, fill=0.0))
        for _ in range(25)
    ]
    shifts = np.abs([shift_mm for shift_mm, _ in seen])
    turns = np.abs([rotation.as_euler("ZXY", degrees=True) for _, rotation in seen])
    # that 25 uniform draws all stay under 0.75 of the range has a probability of 0.0008
    assert (shifts.max(0) < 3.03).all() and (shifts.max(0) > 0.75 * 3).all()
    assert (turns.max(0) < 2.05).all() and (turns.max(0) > 0.75 * 2).all()
