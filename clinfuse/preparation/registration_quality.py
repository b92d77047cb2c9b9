"""Whether a registration can be trusted: measured on the pair itself, where no truth is known.

Mutual information alone says little: its height depends on the scans. What tells a wrong result is
that another search, begun elsewhere with other samples, arrives elsewhere; that the heads do not
cover each other; that moving the scan away hardly matters; or that the head, which has one shape,
would fit better stretched, as another patient's does. The limits were chosen, but for the stretch
that fails, which was fitted; ``experiments/registration`` has the trials they are judged on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from clinfuse.preparation.registration_deformation import smallest_jacobian, stretched
from clinfuse.preparation.registration_search import (
    Pyramid,
    apart_mm,
    mirrored,
    mutual_information,
    search,
)

Verdict = Literal["pass", "warn", "fail"]

DISAGREEMENT_MM = (1.0, 3.0)
"""Two searches that end further apart than this are doubtful, or have failed."""

GIVEN_DISAGREEMENT_MM = (3.0, 10.0)
"""The same for scans that came aligned, by other means and to a tolerance of their own."""

OVERLAP = (0.92, 0.85)
"""Share of the smaller head inside the other below which a registration is doubtful, or failed."""

SHARPNESS = (0.20, 0.12)
"""Share of mutual information lost ``ASIDE_MM`` away below which the optimum is blunt."""

STRETCH_MM = (2.4, 4.4)
"""An affine fit that ends further than this from the rigid one is of another head, or of a scan
whose voxels have another size than its file states. The second limit is fitted, the first is not
(``experiments/registration``)."""

ASIDE_MM = 10.0

COVERED = (0.5, 0.25)
"""Share of the fixed head in view of the moving scan below which little is left to go by."""

MIRRORED_GAIN = 0.02
"""A mirrored scan that fits better by more than this share of mutual information is suspicious."""

TURNED_DEG = 45.0
"""Patients' heads lie straighter than this."""


@dataclass(frozen=True)
class Quality:
    """What was measured of a registration.

    Attributes:
        mutual_information_before, mutual_information: in nats, at 4 mm over the fixed head, with
            the scans where their files put them and as registered.
        disagreement_mm: root mean square over the head between this result and that of another
            search from other starts with other samples.
        mutual_information_elsewhere: where that other search ended.
        sharpness: share of mutual information lost on average when the scan is moved by 10 mm.
        stretch_mm: root mean square over the head between the rigid motion found and the affine
            transform that fits best near it: small for two scans of one head, whose shape is one.
        head_overlap: share of the smaller head that lies in the other, where the moving scan has a
            view; not Dice, since an ADC map shows little more than the brain.
        covered: share of the fixed head in that view.
        mirrored_gain: by what share mutual information is higher with the moving scan mirrored than
            at the better of both results.
        moved_mm, turned_deg: how far the head's centre and axes were from where the files put them.
        smallest_jacobian: of the transform in the head: below 0 it folds; 1 for a rigid one.
        is_given: whether the alignment came with the scans.
    """

    mutual_information_before: float
    mutual_information: float
    disagreement_mm: float
    mutual_information_elsewhere: float
    sharpness: float
    stretch_mm: float
    head_overlap: float
    covered: float
    mirrored_gain: float
    moved_mm: float
    turned_deg: float
    smallest_jacobian: float
    is_given: bool

    @property
    def verdict(self) -> Verdict:
        """The worst of what there is to say."""
        found = [verdict for verdict, _ in self.findings()]
        return "fail" if "fail" in found else "warn" if "warn" in found else "pass"

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentences of ``findings``."""
        return tuple(sentence for _, sentence in self.findings())

    def findings(self) -> list[tuple[Verdict, str]]:
        """A sentence for everything that is not as it should be, and how bad that is by itself."""
        said: list[tuple[Verdict | None, str]] = [
            (
                _above(self.disagreement_mm,
                       GIVEN_DISAGREEMENT_MM if self.is_given else DISAGREEMENT_MM),
                f"another search ended {self.disagreement_mm:.1f} mm away",
            ),
            (
                _below(self.head_overlap, OVERLAP),
                f"only {self.head_overlap:.0%} of the smaller head lies in the other",
            ),
            (
                _below(self.sharpness, SHARPNESS),
                f"moving the CT by {ASIDE_MM:g} mm costs only {self.sharpness:.0%} of the mutual "
                "information",
            ),
            (
                _above(self.stretch_mm, STRETCH_MM),
                f"the heads differ in shape: an affine fit ends {self.stretch_mm:.1f} mm away",
            ),
            (
                _below(self.covered, COVERED),
                f"only {self.covered:.0%} of the head in the MRI is in view of the CT",
            ),
            (
                "warn" if self.mirrored_gain > MIRRORED_GAIN else None,
                f"the CT fits better mirrored left to right: by {self.mirrored_gain:.1%} of the "
                "mutual information",
            ),
            (
                "warn" if self.turned_deg > TURNED_DEG else None,
                f"the head had to be turned by {self.turned_deg:.0f} degrees",
            ),
            (
                "fail" if self.smallest_jacobian <= 0 else None,
                f"the transform folds: its smallest Jacobian is {self.smallest_jacobian:.2f}",
            ),
        ]  # fmt: skip
        return [(verdict, sentence) for verdict, sentence in said if verdict is not None]


def measured(
    pyramid: Pyramid,
    transform: sitk.Transform,
    elsewhere: sitk.Transform,
    seed: int,
    is_given: bool = False,
) -> Quality:
    """The quality of ``transform``, a result from wherever, on the scans of the pyramid.

    Args:
        pyramid: of both scans.
        transform: from fixed to moving points.
        elsewhere: the result of another search that knew nothing of it.
        seed: of the search for a mirrored fit.
        is_given: whether the alignment came with the scans.
    """
    level = pyramid.levels[1]
    points_mm = pyramid.points_mm
    here = mutual_information(level, transform)
    flipped = mirrored(pyramid)
    in_mirror = mutual_information(flipped.levels[1], search(flipped, seed, levels=2)[0])
    there = mutual_information(level, elsewhere)
    aside = np.mean([mutual_information(level, other) for other in _moved_aside(transform)])
    overlap, covered = _overlap(pyramid, transform)
    still = sitk.Transform(3, sitk.sitkIdentity)
    rigid = _rigid_part(points_mm, transform)
    near = _rigid_part(points_mm, elsewhere) if is_given else rigid  # a given place may be off
    return Quality(
        mutual_information_before=mutual_information(level, still),
        mutual_information=here,
        disagreement_mm=apart_mm(transform, elsewhere, points_mm),
        mutual_information_elsewhere=there,
        sharpness=float(1 - aside / here) if here > 0 else 0.0,
        stretch_mm=apart_mm(stretched(level, near, seed), near, points_mm),
        head_overlap=overlap,
        covered=covered,
        mirrored_gain=in_mirror / max(here, there) - 1 if max(here, there) > 0 else 0.0,
        moved_mm=float(np.linalg.norm(rigid.GetTranslation())),
        turned_deg=_turn_deg(rigid),
        smallest_jacobian=smallest_jacobian(level, transform),
        is_given=is_given,
    )


def _moved_aside(transform: sitk.Transform) -> list[sitk.Transform]:
    moves = [sign * ASIDE_MM * axis for axis in np.eye(3) for sign in (-1, 1)]
    return [
        sitk.CompositeTransform([transform, sitk.TranslationTransform(3, move.tolist())])
        for move in moves
    ]


def _overlap(pyramid: Pyramid, transform: sitk.Transform) -> tuple[float, float]:
    """Share of the smaller head in the other, and of the fixed one in view of the moving scan."""
    grid, nearest = pyramid.levels[1].fixed, sitk.sitkNearestNeighbor
    seen = pyramid.moving_head * 0 + 1
    still = sitk.Transform(3, sitk.sitkIdentity)
    fixed, moving, view = (
        sitk.GetArrayFromImage(sitk.Resample(image, grid, motion, nearest)).astype(bool)
        for image, motion in (
            (pyramid.fixed_head, still),
            (pyramid.moving_head, transform),
            (seen, transform),
        )
    )
    smaller = min((fixed & view).sum(), moving.sum())
    overlap = (fixed & moving).sum() / smaller if smaller else 0.0
    return float(overlap), float((fixed & view).sum() / max(fixed.sum(), 1))


def _rigid_part(points_mm: np.ndarray, transform: sitk.Transform) -> sitk.Euler3DTransform:
    """The rigid motion that takes points to where a transform takes them, as well as one can."""
    moved_mm = np.array([transform.TransformPoint(point) for point in points_mm.tolist()])
    centre, goal = points_mm.mean(axis=0), moved_mm.mean(axis=0)
    turn, _ = Rotation.align_vectors(moved_mm - goal, points_mm - centre)
    motion = sitk.Euler3DTransform()
    motion.SetCenter(centre.tolist())
    motion.SetMatrix(turn.as_matrix().ravel().tolist())
    motion.SetTranslation((goal - centre).tolist())
    return motion


def _turn_deg(motion: sitk.Euler3DTransform) -> float:
    matrix = np.array(motion.GetMatrix()).reshape(3, 3)
    return float(np.degrees(Rotation.from_matrix(matrix).magnitude()))


def _above(value: float, limits: Sequence[float]) -> Verdict | None:
    doubtful, failed = limits
    return "fail" if value > failed else "warn" if value > doubtful else None


def _below(value: float, limits: Sequence[float]) -> Verdict | None:
    doubtful, failed = limits
    return "fail" if value < failed else "warn" if value < doubtful else None
