import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from clinfuse.data.slices import (
    KINDS,
    Pair,
    find_pairs,
    kind_named,
    patients_of,
    read_pair,
    read_picture,
    write_colour,
)
from clinfuse.functional.colour import rgb_to_ycbcr

SPECT, CT, GFP = KINDS["spect_mri"], KINDS["ct_mri"], KINDS["gfp_pc"]

ROUNDING = 0.53
"""Levels by which (Cb, Cr) move at most when R, G and B do by half a level: |(-0.337, 1)| / 2."""


def picture(path, size=(12, 9), seed=0, grey=False, save=True, **options):
    """Random pixels, (w, h) as Pillow has it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    if save:
        image.save(path, **options)
    return image


def spect_set(root, names, **options):
    for number, name in enumerate(names):
        picture(root / "SPECT" / f"{name}.png", seed=number, **options)
        picture(root / "MRI" / f"{name}.png", seed=number + 100, grey=True, **options)
    return root


def names(pairs):
    return [pair.name for pair in pairs]


def test_pairs_share_a_name_and_what_has_no_partner_is_named_in_one_sentence(tmp_path, caplog):
    root = spect_set(tmp_path, ["21001", "21002", "22001"])
    (root / "MRI" / "22001.png").unlink()
    picture(root / "MRI" / "9001.png")
    (root / "MRI" / "Thumbs.db").write_bytes(b"")
    assert names(find_pairs(root, SPECT)) == ["21001", "21002"]
    (record,) = caplog.records
    assert "without a partner of its name: MRI/9001.png, SPECT/22001.png" in record.message


def test_a_pair_of_two_sizes_is_left_out_and_never_resampled(tmp_path, caplog):
    root = spect_set(tmp_path, ["21001", "21002"])
    picture(root / "SPECT" / "21002.png", size=(20, 9))
    assert names(find_pairs(root, SPECT)) == ["21001"]
    assert "of another size than its partner: SPECT/21002.png" in caplog.text
    pair = Pair("x", "x", root / "MRI" / "21002.png", root / "SPECT" / "21002.png")
    with pytest.raises(ValueError, match=r"one size .*\(12, 9\) in .*MRI.* \(20, 9\) in .*SPECT"):
        read_pair(pair, SPECT)


def test_the_set_is_found_from_the_folder_around_it_and_by_either_layouts_names(tmp_path):
    spect_set(tmp_path / "aanlib" / "SPECT-MRI", ["2001"])
    assert names(find_pairs(tmp_path / "aanlib", SPECT)) == ["2001"]
    for folder, ending in (("g", ""), ("f", "")):
        picture(tmp_path / "own" / "GFP" / folder / f"a{ending}.jpg")
    assert names(find_pairs(tmp_path / "own", GFP)) == ["a"]
    for folder, ending in (("GFP", "-g"), ("PCI", "-t")):
        picture(tmp_path / "jic" / folder / f"02-A02{ending}.jpg")
    (pair,) = find_pairs(tmp_path / "jic", GFP)
    assert (pair.name, pair.ct.name, pair.mri.name) == ("02-A02", "02-A02-g.jpg", "02-A02-t.jpg")


def test_pictures_that_share_names_but_no_size_are_no_pairs(tmp_path):
    root = spect_set(tmp_path, ["21001"])
    picture(root / "SPECT" / "21001.png", size=(20, 9))
    with pytest.raises(FileNotFoundError, match="of one name and one size, found none in"):
        find_pairs(root, SPECT)


def test_a_split_folder_without_one_of_the_sources_is_left_out_by_name(tmp_path, caplog):
    spect_set(tmp_path / "train", ["10001"])
    picture(tmp_path / "test" / "MRI" / "11001.png")
    assert names(find_pairs(tmp_path, SPECT)) == ["10001"]
    assert "left out, without a folder of the other source: test/MRI" in caplog.text


def test_pairs_in_folders_of_train_val_and_test_know_their_split(tmp_path):
    spect_set(tmp_path / "train", ["10001", "10002"])
    spect_set(tmp_path / "test", ["11001"])
    found = find_pairs(tmp_path, SPECT)
    assert [(p.name, p.split) for p in found] == [
        ("10001", "train"),
        ("10002", "train"),
        ("11001", "test"),
    ]


def test_folders_that_each_count_from_zero_are_told_apart_but_copies_are_refused(tmp_path):
    spect_set(tmp_path / "train", ["0000"])
    picture(tmp_path / "test" / "SPECT" / "0000.png", seed=8)
    picture(tmp_path / "test" / "MRI" / "0000.png", seed=9, grey=True)
    assert names(find_pairs(tmp_path, SPECT)) == ["0000", "test_0000"]
    spect_set(tmp_path / "val", ["0000"])
    with pytest.raises(ValueError, match="'0000' in train and val"):
        find_pairs(tmp_path, SPECT)


@pytest.mark.parametrize(
    ("name", "case"),
    [("20005", "20"), ("2005", "2"), ("0000", "0000"), ("120005", "120005"), ("ab", "ab")],
)
def test_the_case_number_comes_before_three_digits_of_slice(tmp_path, name, case):
    (pair,) = find_pairs(spect_set(tmp_path, [name]), SPECT)
    assert pair.case == case


def test_the_one_head_of_the_atlas_pet_is_one_patient_in_a_wider_set_too(tmp_path):
    kind = KINDS["pet_mri"]
    for name in ("25001", "30001", "41001"):
        picture(tmp_path / "PET" / f"{name}.png")
        picture(tmp_path / "MRI" / f"{name}.png", grey=True)
    assert len(set(patients_of(find_pairs(tmp_path, kind), kind).values())) == 1
    picture(tmp_path / "PET" / "7001.png")
    picture(tmp_path / "MRI" / "7001.png", grey=True)
    assert set(patients_of(find_pairs(tmp_path, kind), kind).values()) == {"7", "25 = 30 = 41"}


def test_both_sources_are_luma_in_model_space_and_chroma_is_kept(tmp_path):
    root = spect_set(tmp_path, ["21001"])
    found = read_pair(find_pairs(root, SPECT)[0], SPECT)
    rgb = np.asarray(Image.open(root / "SPECT" / "21001.png")) / 255.0
    luma = rgb @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(found.ct[0], 2 * luma - 1, atol=1e-6)
    np.testing.assert_allclose(found.chroma[0], (rgb[..., 2] - luma) / 1.772, atol=1e-6)
    np.testing.assert_allclose(found.chroma[1], (rgb[..., 0] - luma) / 1.402, atol=1e-6)
    grey = np.asarray(Image.open(root / "MRI" / "21001.png")) / 255.0
    np.testing.assert_allclose(found.mri[0], 2 * grey - 1, atol=1e-6)
    assert not found.roi.any() and found.spacing_mm == (0.9, 0.9)


def test_colour_where_the_kind_is_grey_is_refused_and_grey_where_it_may_have_colour_is_not(
    tmp_path,
):
    root = spect_set(tmp_path / "spect", ["21001"])
    (pair,) = find_pairs(root, SPECT)
    exchanged = replace(pair, mri=pair.ct, ct=pair.mri)
    with pytest.raises(ValueError, match=r"expected a grey picture, got colour .*SPECT.21001\.png"):
        read_pair(exchanged, SPECT)
    with pytest.raises(ValueError, match=r"expected a grey picture, got colour .*SPECT.21001\.png"):
        read_pair(pair, CT)
    assert not read_pair(replace(pair, ct=pair.mri), SPECT).chroma.abs().gt(1e-6).any()


def test_a_ct_has_brain_and_bone_and_no_colour(tmp_path):
    h, w = np.mgrid[-40:40, -35:35]
    radius = np.hypot(h / 36, w / 30)
    brain, bone = radius < 0.8, (radius >= 0.8) & (radius < 1)
    for folder, values in (("CT", 90 * brain + 255 * bone), ("MRI", 200 * brain)):
        (tmp_path / folder).mkdir()
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / folder / "20001.png")
    found = read_pair(find_pairs(tmp_path, CT)[0], CT)
    assert found.chroma is None and found.is_ct
    assert torch.equal(found.roi[1], torch.from_numpy(bone))
    overlap = 2 * (found.roi[0].numpy() & brain).sum() / (found.roi[0].sum() + brain.sum())
    assert overlap > 0.95 and not found.roi[2].any()


@pytest.mark.parametrize("size", [(8, 7), (7, 60), (1, 1)], ids=str)
def test_a_picture_too_small_for_windows_and_networks_is_refused(tmp_path, size):
    spect_set(tmp_path, ["9001"], size=size)
    spect_set(tmp_path, ["9002"], size=(8, 8))
    small, enough = find_pairs(tmp_path, SPECT)
    said = re.escape(f"at least 8 pixels a side, got {size} (w, h): {small.mri}")
    with pytest.raises(ValueError, match=said):
        read_pair(small, SPECT)
    assert read_pair(enough, SPECT).mri.shape == (1, 8, 8)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK"])
def test_every_way_of_storing_8_bits_reads_as_what_it_shows(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    shown = Image.fromarray(np.tile(np.uint8([[0, 51, 255]]), (2, 1)))
    shown.convert(mode).save(path)
    expected = torch.tensor([0.0, 0.2, 1.0]).expand(3, 2, 3)
    torch.testing.assert_close(read_picture(path), expected)


def test_what_is_no_opaque_8_bit_picture_is_refused_by_name(tmp_path):
    deep, glass, text, cut = (tmp_path / f"{name}.png" for name in ("deep", "glass", "text", "cut"))
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep)
    Image.fromarray(np.full((4, 4, 4), 100, np.uint8)).save(glass)
    text.write_text("not a picture")
    picture(cut, size=(60, 60))
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"8 bits a channel, got mode I;16 .*deep\.png"):
        read_picture(deep)
    colour = sitk.GetImageFromArray(np.full((4, 5, 3), 40000, np.uint16), isVector=True)
    for path in (tmp_path / "rich.png", tmp_path / "rich.tif"):  # of which Pillow keeps half
        sitk.WriteImage(colour, path)
        with pytest.raises(ValueError, match=r"8 bits a channel, got mode RGB stored as .*;16"):
            read_picture(path)
    with pytest.raises(ValueError, match=r"opaque picture, got transparent pixels: .*glass\.png"):
        read_picture(glass)
    with pytest.raises(ValueError, match=r"expected a picture, got something unreadable: .*text"):
        read_picture(text)
    with pytest.raises(ValueError, match=r"whole picture, got a damaged one .*cut\.png"):
        read_picture(cut)
    with pytest.raises(FileNotFoundError, match=r"found nothing at .*gone\.png"):
        read_picture(tmp_path / "gone.png")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_file_of_several_pictures_is_not_read_as_its_first(tmp_path, suffix):
    path = tmp_path / f"stack.{suffix}"
    stack = [picture(path, seed=seed, save=False) for seed in range(3)]
    stack[0].save(path, save_all=True, append_images=stack[1:])
    with pytest.raises(ValueError, match=rf"expected one picture in a file, got 3: .*{path.name}"):
        read_picture(path)


def test_a_picture_of_more_pixels_than_are_safe_to_unpack_is_refused_with_their_number(
    tmp_path, monkeypatch
):
    picture(tmp_path / "vast.png", size=(60, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"unreadable \(.*3600 pixels.* exceeds .*vast\.png"):
        read_picture(tmp_path / "vast.png")


def test_a_root_without_pairs_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no folder at"):
        find_pairs(tmp_path / "absent", SPECT)
    with pytest.raises(FileNotFoundError, match=r"folders MRI and SPECT.* found none in"):
        find_pairs(tmp_path, SPECT)
    picture(tmp_path / "MRI" / "1001.png")
    picture(tmp_path / "test" / "MRI" / "1001.png")
    with pytest.raises(FileNotFoundError, match="found MRI and test/MRI in"):
        find_pairs(tmp_path, SPECT)
    picture(tmp_path / "SPECT" / "1002.png")
    with pytest.raises(FileNotFoundError, match=r"pairs of pictures \(.png, .* of one name"):
        find_pairs(tmp_path, SPECT)
    picture(tmp_path / "MRI" / "1001.jpg")
    with pytest.raises(ValueError, match=r"one file of a name, got 1001\.jpg and 1001\.png"):
        find_pairs(tmp_path, SPECT)
    with pytest.raises(ValueError, match=r"expected a kind of pair of ct_mri, .*, got 'xray'"):
        kind_named("xray")


def levels_of(path):
    """Cb and Cr of a written picture, in levels of 255."""
    return 255 * rgb_to_ycbcr(read_picture(path)[None].double())[0, 1:]


def test_a_fused_picture_has_the_luma_of_the_method_and_the_hue_of_the_source(tmp_path):
    root = spect_set(tmp_path, ["21001"], size=(160, 120))
    found = read_pair(find_pairs(root, SPECT)[0], SPECT)
    fused = (found.mri + found.ct) / 2
    written = read_picture(write_colour(tmp_path / "fused" / "a.png", fused, found.chroma))
    luma = rgb_to_ycbcr(written[None].double())[0, 0]
    assert (255 * luma - 255 * (fused[0] + 1) / 2).abs().max() <= 0.5 + 1e-4  # rounded R, G, B
    cb, cr = levels_of(tmp_path / "fused" / "a.png")
    source_cb, source_cr = levels_of(root / "SPECT" / "21001.png")
    length = torch.hypot(source_cb, source_cr).clamp(min=1e-9)
    along = (cb * source_cb + cr * source_cr) / length
    aside = (cb * source_cr - cr * source_cb) / length
    assert aside.abs().max() < ROUNDING and along.min() > -ROUNDING  # one hue,
    assert (along - length).max() < ROUNDING  # never more saturated than the source,
    rgb = written.double()
    inside = (rgb.amin(0) > 0) & (rgb.amax(0) < 1)
    assert inside.double().mean() > 0.3
    apart = torch.hypot(cb - source_cb, cr - source_cr)[inside]
    # where RGB has the colour, R, G and B move by one amount, and so are rounded alike but for ties
    assert apart.max() < ROUNDING and (apart < 1e-3).double().mean() > 0.98


def test_without_chroma_the_picture_is_grey(tmp_path):
    fused = torch.linspace(-1, 1, 256)[None, None]
    path = write_colour(tmp_path / "grey.png", fused, None)
    image = Image.open(path)
    assert image.mode == "L" and np.asarray(image)[0].tolist() == list(range(256))


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    target = tmp_path / "a.png"
    target.mkdir()
    with pytest.raises(OSError):
        write_colour(target, torch.zeros(1, 4, 4), None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


REAL = {
    "ct_mri": ("harvard_aanlib", 149, 8),
    "pet_mri": ("harvard_aanlib", 269, 1),
    "spect_mri": ("harvard_aanlib", 276, 12),
    "gfp_pc": ("gfp_pc", 117, 117),
    "vis_ir": ("roadscene", 50, 50),
}


@pytest.mark.parametrize("kind", REAL)
def test_the_real_sets_load_fuse_and_keep_their_hue(kind, shared_data, tmp_path, caplog):
    folder, count, patients = REAL[kind]
    pairs = find_pairs(shared_data / folder, KINDS[kind])
    assert len(pairs) == count and len(set(patients_of(pairs, KINDS[kind]).values())) == patients
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == (kind == "gfp_pc")  # 02-C05-g.jpg is of another size
    for pair in (pairs[0], pairs[count // 2]):
        found = read_pair(pair, KINDS[kind])
        path = write_colour(tmp_path / "a.png", (found.mri + found.ct) / 2, found.chroma)
        if found.chroma is None:
            assert Image.open(path).mode == "L" and found.roi[:2].any((1, 2)).all()
            continue
        cb, cr = levels_of(path)
        source_cb, source_cr = 255 * found.chroma.double()
        length = torch.hypot(source_cb, source_cr).clamp(min=1e-9)
        assert ((cb * source_cr - cr * source_cb) / length).abs().max() < ROUNDING
        assert ((cb * source_cb + cr * source_cr) / length).min() > -ROUNDING
        assert length.max() > 20 and cb.abs().max() + cr.abs().max() > 10  # there is colour


def test_a_tiff_that_does_not_say_how_wide_it_is_is_refused_by_name(tmp_path):
    path = tmp_path / "a.tif"
    Image.new("L", (9, 8)).save(path)
    width = (256).to_bytes(2, "little")  # the tag, as little-endian TIFF has it
    path.write_bytes(path.read_bytes().replace(width + b"\4", b"\xff\xff\4", 1))
    with pytest.raises(ValueError, match=f"expected a .*picture.*{path}"):
        read_picture(path)
