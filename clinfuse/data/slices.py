"""Pairs of 2-D pictures: the layouts they come in, their colour, and fused pictures in colour."""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from clinfuse.data.splits import SPLITS
from clinfuse.functional.colour import coloured, rgb_to_ycbcr
from clinfuse.functional.intensity import ct_to_model
from clinfuse.roi.masks import bone_mask, brain_mask
from clinfuse.types import ROI_NAMES

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

HARVARD_CASE = r"([1-9]\d?)\d{3}"
"""Case number and three digits of slice: 20005 is slice 5 of case 20, 2005 is slice 5 of case 2."""

HARVARD_MM = 0.9
"""Pixel of the Whole Brain Atlas, whose pictures do not state it: 256 of them span 230 mm."""

THICKNESS_MM = 5.0
"""Of a slice, also assumed: it turns areas of bone into volumes."""

SMALLEST = 8
"""Pixels a side of a picture, at least: below, windows and networks have nothing to look at."""

GREY_LEVELS = 16.0
"""Cb and Cr, in levels of 255, up to which a picture passes for grey: JPEG leaves some."""


@dataclass(frozen=True)
class PairKind:
    """What a kind of pair is called on disk, and what its names say.

    Attributes:
        mri: folders that hold the anatomical source, which is fused as ``mri``.
        ct: folders that hold the other, whose luma is fused as ``ct`` and whose colour is kept.
        sets: what the folder around them may be called.
        endings: what ``mri`` and ``ct`` file names end in beyond the name they share.
        case_pattern: expression for a whole name whose first group is the patient; None where
            every picture is a case of its own.
        one_patient: case numbers of the atlas that are known to be one person.
        is_ct: whether the second source is a CT (in an 8-bit window): the only one with ROI masks.
        is_colour: whether the second source may have a colour to keep.
        pixel_mm: size of a pixel; 1 where pictures have no scale, so that millimetres are pixels.
    """

    mri: tuple[str, ...]
    ct: tuple[str, ...]
    sets: tuple[str, ...]
    endings: tuple[str, str] = ("", "")
    case_pattern: str | None = None
    one_patient: frozenset[str] = frozenset()
    is_ct: bool = False
    is_colour: bool = True
    pixel_mm: float = 1.0


KINDS: Mapping[str, PairKind] = {
    "ct_mri": PairKind(
        ("MRI",), ("CT",), ("CT-MRI",), case_pattern=HARVARD_CASE, is_ct=True, is_colour=False,
        pixel_mm=HARVARD_MM,
    ),
    "pet_mri": PairKind(  # the atlas's only PET: one head cut along three planes
        ("MRI",), ("PET",), ("PET-MRI",), case_pattern=HARVARD_CASE,
        one_patient=frozenset({"25", "30", "41"}), pixel_mm=HARVARD_MM,
    ),
    "spect_mri": PairKind(
        ("MRI",), ("SPECT",), ("SPECT-MRI",), case_pattern=HARVARD_CASE, pixel_mm=HARVARD_MM
    ),
    "gfp_pc": PairKind(
        ("PCI", "PC", "f"), ("GFP", "g"), ("gfp_pc", "GFP-PCI", "GFP"), endings=("-t", "-g")
    ),
    "vis_ir": PairKind(
        ("ir", "IR", "infrared"), ("vi", "VI", "visible"), ("roadscene", "RoadScene")
    ),
}  # fmt: skip
"""CT, PET and SPECT with MRI, fluorescence with phase contrast, visible light with infrared."""


@dataclass(frozen=True)
class Pair:
    """Two files that belong together.

    Attributes:
        name: unique in the set.
        case: the patient, as the name says it, else the name.
        mri: file of the anatomical source.
        ct: file of the other.
        split: the split whose folder they lie in, if they do.
    """

    name: str
    case: str
    mri: Path
    ct: Path
    split: str | None = None


@dataclass(frozen=True)
class Slice:
    """A pair in memory, in model space [-1, 1], rows from top to bottom.

    Attributes:
        case_id: the pair's name.
        mri: luma of the anatomical source.
        ct: luma of the other, or CT.
        chroma: Cb and Cr of the second source, zero where it is grey; None if grey by its kind.
        roi: masks in ``ROI_NAMES`` order: for a CT brain and bone as they are segmented in it (at
            the vertex there may be none), else empty; never a lesion.
        spacing_mm: pixel size (h, w).
        is_ct: whether the second source is a CT, in an 8-bit window.
        reference: what training is to aim at; None where nothing says so.
    """

    case_id: str
    mri: Float[Tensor, "1 h w"]
    ct: Float[Tensor, "1 h w"]
    chroma: Float[Tensor, "2 h w"] | None
    roi: Bool[Tensor, "r h w"]
    spacing_mm: tuple[float, float]
    is_ct: bool = False
    reference: Float[Tensor, "1 h w"] | None = None


def kind_named(name: str) -> PairKind:
    """One of ``KINDS``.

    Raises:
        ValueError: no such kind.
    """
    if name not in KINDS:
        raise ValueError(f"expected a kind of pair of {', '.join(KINDS)}, got {name!r}")
    return KINDS[name]


def find_pairs(root: Path | str, kind: PairKind) -> list[Pair]:
    """The pairs of a set, by name.

    The layouts read are ``SET/{CT,MRI}/NAME.png`` and ``SET/{train,val,test}/{CT,MRI}/NAME.png``
    with the folder names of the kind; ``root`` is SET or the folder around it. What has no partner
    of its name, or one of another size, is left out and named in the log; so is one of train, val
    and test that has one source alone.

    Raises:
        FileNotFoundError: no such folders, or no pair in them.
        ValueError: two files of one name in a folder, a file that is no picture, or one pair in
            two of train, val and test.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"expected a folder of picture pairs, found no folder at {root}")
    folders = [root, *(root / name for name in kind.sets)]
    for folder in folders:
        if (sources := _sources(folder, kind)) is not None:
            pairs = _pairs_of(*sources, kind, None)
            break
        parts = {split: _sources(folder / split, kind) for split in SPLITS}
        if any(parts.values()):
            found = [_pairs_of(*both, kind, split) for split, both in parts.items() if both]
            alone = [path for split in SPLITS for path in _alone(folder / split, kind)]
            _left_out("without a folder of the other source", alone, folder)
            pairs = _told_apart([pair for part in found for pair in part], kind)
            break
    else:
        places = [place for f in folders for place in (f, *(f / split for split in SPLITS))]
        names = [str(path.relative_to(root)) for place in places for path in _alone(place, kind)]
        raise FileNotFoundError(
            f"expected folders {'|'.join(kind.mri)} and {'|'.join(kind.ct)}, by themselves or in "
            f"train, val and test, found {' and '.join(names) or 'none'} in {root}"
        )
    if not pairs:
        raise FileNotFoundError(
            f"expected pairs of pictures ({', '.join(SUFFIXES)}) of one name and one size, found "
            f"none in {folder}"
        )
    return pairs


def patients_of(pairs: Sequence[Pair], kind: PairKind) -> dict[str, str]:
    """The patient of each pair, by its name; cases that are known to be one person are one."""
    same = " = ".join(sorted(kind.one_patient))
    return {pair.name: same if pair.case in kind.one_patient else pair.case for pair in pairs}


def read_pair(pair: Pair, kind: PairKind) -> Slice:
    """Both pictures in model space: black is -1 and white is 1.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, the two differ in size or are too small, or a source that
            is grey by its kind has colour: the folders may be exchanged.
    """
    mri, ct = (rgb_to_ycbcr(read_picture(path)[None])[0] for path in (pair.mri, pair.ct))
    if mri.shape != ct.shape:
        sizes = [f"{tuple(p.shape[:0:-1])} in {f}" for p, f in ((mri, pair.mri), (ct, pair.ct))]
        raise ValueError(f"expected two pictures of one size (w, h), got {' and '.join(sizes)}")
    if min(mri.shape[1:]) < SMALLEST:
        raise ValueError(
            f"expected pictures of at least {SMALLEST} pixels a side, got "
            f"{tuple(mri.shape[:0:-1])} (w, h): {pair.mri}"
        )
    for picture, path, is_grey in ((mri, pair.mri, True), (ct, pair.ct, not kind.is_colour)):
        levels = 255 * float(picture[1:].abs().max())
        if is_grey and levels > GREY_LEVELS:
            raise ValueError(
                f"expected a grey picture, got colour (Cb and Cr of up to {levels:.0f}): {path}"
            )
    return Slice(
        case_id=pair.name,
        mri=2 * mri[:1] - 1,
        ct=ct_to_model(255 * ct[:1], "window_8bit") if kind.is_ct else 2 * ct[:1] - 1,
        chroma=ct[1:] if kind.is_colour else None,
        roi=_ct_masks(255 * ct[0], kind.pixel_mm) if kind.is_ct else _no_masks(mri),
        spacing_mm=(kind.pixel_mm, kind.pixel_mm),
        is_ct=kind.is_ct,
    )


def read_picture(path: Path | str) -> Float[Tensor, "3 h w"]:
    """A picture as RGB in [0, 1], rows from top to bottom; a grey one has three equal channels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture, several in one file, truncated, not of 8 bits a channel, or
            partly transparent.
    """
    with _opened(Path(path)) as image:
        how = [str(tile.args) for tile in image.tile]  # Pillow reads 16-bit colour as mode RGB
        if image.mode not in _MODES or any(";16" in stored for stored in how):
            got = f"mode {image.mode}" + (f" stored as {how[0]}" if how else "")
            raise ValueError(f"expected 8 bits a channel, got {got}: {path}")
        try:
            pictures = getattr(image, "n_frames", 1)
            rgba = np.asarray(image.convert("RGBA"))
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(
                f"expected a whole picture, got a damaged one ({error}): {path}"
            ) from error
    if pictures > 1:
        raise ValueError(f"expected one picture in a file, got {pictures}: {path}")
    if rgba[..., 3].min() < 255:
        raise ValueError(f"expected an opaque picture, got transparent pixels: {path}")
    return torch.from_numpy(rgba[..., :3].transpose(2, 0, 1) / np.float32(255))


def colour_picture(
    fused: Float[Tensor, "1 h w"], chroma: Float[Tensor, "2 h w"] | None
) -> Image.Image:
    """A fused luma as an 8-bit picture, in the hue of the source that ``chroma`` comes from.

    Cb and Cr are the source's, scaled towards grey only where RGB has no such colour at this luma
    (``functional.colour.into_gamut``); a grey picture without chroma.
    """
    luma = (fused.float().cpu().clamp(-1, 1) + 1) / 2
    if chroma is None:
        return Image.fromarray(_bytes(luma[0]))
    rgb = coloured(luma[None], chroma.float().cpu()[None])[0]
    return Image.fromarray(_bytes(rgb.movedim(0, -1)))


def write_colour(
    path: Path | str, fused: Float[Tensor, "1 h w"], chroma: Float[Tensor, "2 h w"] | None
) -> Path:
    """Write ``colour_picture`` as PNG, which keeps every level; the file appears whole or not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        colour_picture(fused, chroma).save(partial, format="PNG")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")


def _sources(folder: Path, kind: PairKind) -> tuple[Path, Path] | None:
    mri, ct = (
        next((folder / name for name in names if (folder / name).is_dir()), None)
        for names in (kind.mri, kind.ct)
    )
    return None if mri is None or ct is None else (mri, ct)


def _alone(folder: Path, kind: PairKind) -> list[Path]:
    """The folders of one source, where none of the other lies beside them."""
    if _sources(folder, kind) is not None:
        return []
    return [folder / name for name in (*kind.mri, *kind.ct) if (folder / name).is_dir()]


def _pairs_of(mri: Path, ct: Path, kind: PairKind, split: str | None) -> list[Pair]:
    files = [_by_name(folder, end) for folder, end in zip((mri, ct), kind.endings, strict=True)]
    lonely = [
        path for one, other in (files, files[::-1]) for n, path in one.items() if n not in other
    ]
    _left_out("without a partner of its name", lonely, mri.parent)
    pairs = [
        Pair(name, _case(name, kind), files[0][name], files[1][name], split)
        for name in sorted(files[0].keys() & files[1].keys())
    ]
    unequal = [pair for pair in pairs if _size(pair.mri) != _size(pair.ct)]
    _left_out("of another size than its partner", [pair.ct for pair in unequal], mri.parent)
    return [pair for pair in pairs if pair not in unequal]


def _by_name(folder: Path, ending: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        name = path.stem.removesuffix(ending)
        if name in files:
            raise ValueError(
                f"expected one file of a name, got {files[name].name} and {path.name}: {folder}"
            )
        files[name] = path
    return files


def _case(name: str, kind: PairKind) -> str:
    said = re.fullmatch(kind.case_pattern, name) if kind.case_pattern else None
    return said[1] if said else name


def _told_apart(pairs: Sequence[Pair], kind: PairKind) -> list[Pair]:
    """Pairs of split folders under names of their own, where each folder numbers from 0."""
    first: dict[str, Pair] = {}
    named = []
    for pair in pairs:
        other = first.setdefault(pair.name, pair)
        if other is not pair:
            is_known = pair.case != pair.name
            if is_known or other.mri.read_bytes() == pair.mri.read_bytes():
                raise ValueError(
                    f"expected each pair in one of train, val and test, got {pair.name!r} in "
                    f"{other.split} and {pair.split}: {pair.mri} and {other.mri}"
                )
            own = f"{pair.split}_{pair.name}"
            pair = replace(pair, name=own, case=own)
        named.append(pair)
    return named


def _left_out(why: str, paths: Iterable[Path], folder: Path) -> None:
    names = sorted(str(path.relative_to(folder)) for path in paths)
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        log.warning("%s: left out, %s: %s%s", folder, why, ", ".join(names[:8]), more)


def _opened(path: Path) -> ImageFile.ImageFile:
    """The picture, its pixels not yet read."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a picture, found nothing at {path}")
    try:
        return Image.open(path)
    except UnidentifiedImageError as error:
        raise ValueError(f"expected a picture, got something unreadable: {path}") from error
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(
            f"expected a picture, got something unreadable ({error}): {path}"
        ) from error


def _size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        return image.size


def _ct_masks(ct: Float[Tensor, "h w"], pixel_mm: float) -> Bool[Tensor, "3 h w"]:
    """Brain and bone of a slice, as ``roi.masks`` finds them in a volume of one slice."""
    volume, spacing_mm = ct[None].numpy(), (THICKNESS_MM, pixel_mm, pixel_mm)
    bone = bone_mask(volume, spacing_mm, is_hu=False)
    brain = brain_mask(volume, bone, spacing_mm) if bone.any() else np.zeros_like(bone)
    return torch.from_numpy(np.concatenate([brain, bone, np.zeros_like(bone)]))


def _no_masks(like: Tensor) -> Bool[Tensor, "r h w"]:
    return torch.zeros((len(ROI_NAMES), *like.shape[1:]), dtype=torch.bool)


def _bytes(values: Tensor) -> np.ndarray:
    return (255 * values).round().to(torch.uint8).numpy()
