"""Calling TotalSegmentator: a small program in its place always, the real one where there is one.

The small program stands in for somebody else's: it takes the same arguments, reads NIfTI and
writes masks as the tool does. The real tool runs with models without training where
``CLINFUSE_TOTALSEGMENTATOR`` names its program.
"""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from clinfuse.preparation.grids import is_on
from clinfuse.preparation.masks import Classical
from clinfuse.preparation.totalsegmentator import TotalSegmentator, totalsegmentator_or_classical

REAL = os.environ.get("CLINFUSE_TOTALSEGMENTATOR")

STAND_IN = """#!{python}
import argparse, json, os, subprocess, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("-i", type=Path)
parser.add_argument("-o", type=Path)
parser.add_argument("--task")
parser.add_argument("--roi_subset", nargs="+")
parser.add_argument("--fast", action="store_true")
parser.add_argument("--device")
parser.add_argument("--version", action="version", version="2.99.1")
asked = parser.parse_args()
import nibabel, numpy

behaviour = {behaviour!r}
record = Path({record!r})
with record.open("a") as file:
    home = Path(os.environ["TOTALSEG_HOME_DIR"], "config.json")
    file.write(json.dumps({{
        "arguments": sys.argv[1:], "weights": os.environ["TOTALSEG_WEIGHTS_PATH"],
        "configuration": json.loads(home.read_text()),
    }}) + "\\n")
print("If you use this tool please cite it")
if behaviour == "fails":
    print("Traceback\\n  somewhere", file=sys.stderr)
    sys.exit("RuntimeError: CUDA out of memory")
if behaviour == "sleeps":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    record.with_suffix(".pid").write_text(str(child.pid))
    time.sleep(60)
asked.o.mkdir(exist_ok=True, parents=True)
given = nibabel.load(asked.i)
voxels, affine = given.get_fdata(), given.affine
for roi in asked.roi_subset:
    if behaviour == "lacks " + roi:
        continue
    low, high = {{"brain": (0, 400), "skull": (400, 5000)}}[roi]
    mask = (voxels > low) & (voxels <= high) & (behaviour != "finds no " + roi)
    if behaviour == "another grid":
        affine = affine @ numpy.diag([2, 2, 2, 1])
    out = asked.o / (roi + ".nii.gz")
    nibabel.save(nibabel.Nifti1Image(mask.astype(numpy.uint8), affine), out)
    if behaviour == "writes no image":
        out.write_text("no image")
"""


@pytest.fixture
def program(tmp_path):
    """Writes the stand-in with a behaviour; it notes how it was called in ``calls``."""

    def write(behaviour=""):
        path = tmp_path / "bin" / "TotalSegmentator"
        path.parent.mkdir(exist_ok=True)
        record = str(tmp_path / "calls")
        path.write_text(STAND_IN.format(python=sys.executable, behaviour=behaviour, record=record))
        path.chmod(0o755)
        return path

    return write


def calls(folder):
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def head_pair():
    """MRI and CT of a lopsided head on an oblique grid whose axes are permuted and mirrored.

    Soft tissue is a box, bone are two blocks in two of its corners: no mirror image and no other
    order of axes looks like it.
    """
    ct = np.full((36, 72, 80), -1000, np.float32)
    ct[8:30, 12:58, 10:58] = 40
    ct[20:29, 14:30, 12:26] = 1500
    ct[9:13, 40:56, 44:50] = 1500
    mri = np.where(ct == 40, 300, 0).astype(np.float32)
    turn = np.array(sitk.Euler3DTransform((0, 0, 0), 0.05, -0.1, 0.2).GetMatrix()).reshape(3, 3)
    axes = turn @ np.array([[0, 0, 1], [-1, 0, 0], [0, 1, 0]]) @ np.diag([1, 1, -1])
    images = []
    for array in (mri, ct):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((2.0, 2.2, 4.0))
        image.SetOrigin((31.0, -64.0, 12.0))
        image.SetDirection(axes.ravel().tolist())
        images.append(image)
    return images


def array_of(image):
    return sitk.GetArrayFromImage(image)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def weights_folder(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
    return folder


def test_brain_and_skull_come_back_on_the_studys_grid_with_their_provenance(program, tmp_path):
    mri, ct = head_pair()
    masks = TotalSegmentator(program=program(), device="cpu")(mri, ct, {})
    assert is_on(masks.brain, ct) and masks.brain.GetPixelID() == sitk.sitkUInt8
    assert ((array_of(masks.brain) > 0) == (array_of(ct) == 40)).all()
    assert ((array_of(masks.bone) > 0) == (array_of(ct) == 1500)).all()
    assert masks.lesion is None
    (call,) = calls(tmp_path)
    asked = " ".join(call["arguments"])
    assert "--task total --roi_subset brain skull --device cpu" in asked and "--fast" not in asked
    assert masks.provenance["bone"] == {
        "tool": "TotalSegmentator", "version": "2.99.1", "task": "total",
        "parameters": {"label": "skull", "fast": False, "device": "cpu", "models": []},
    }  # fmt: skip


def test_the_brain_can_be_found_in_mri_by_its_own_task(program, tmp_path):
    mri, ct = head_pair()
    provider = TotalSegmentator(program=program(), brain_from="mri", fast=True, device="gpu:1")
    masks = provider(mri, ct, {})
    assert ((array_of(masks.brain) > 0) == (array_of(mri) == 300)).all()
    of_ct, of_mri = (" ".join(call["arguments"]) for call in calls(tmp_path))
    assert "--task total --roi_subset skull --device gpu:1 --fast" in of_ct
    assert "--task total_mr --roi_subset brain --device gpu:1 --fast" in of_mri
    assert masks.provenance["brain"]["task"] == "total_mr"
    assert masks.provenance["bone"]["task"] == "total"


def test_the_tool_gets_its_weights_and_sends_no_statistics(program, tmp_path):
    names = ("Dataset297_three_mm", "Dataset298_six_mm")
    weights = weights_folder(tmp_path / "weights", *names)
    provider = TotalSegmentator(program=program(), weights=weights, fast=True)
    masks = provider(*head_pair(), {})
    (call,) = calls(tmp_path)
    assert call["weights"] == str(weights)
    assert call["configuration"]["send_usage_stats"] is False
    assert masks.provenance["brain"]["parameters"]["models"] == list(names)


def test_missing_weights_are_named_before_the_tool_downloads_any(program, tmp_path):
    weights = weights_folder(tmp_path / "weights", "Dataset297_three_mm")
    with pytest.raises(FileNotFoundError, match=r"expected the model Dataset298_\*.*weights"):
        TotalSegmentator(program=program(), weights=weights, fast=True)(*head_pair(), {})
    with pytest.raises(FileNotFoundError, match="expected a folder of weights, found none"):
        TotalSegmentator(program=program(), weights=tmp_path / "none")(*head_pair(), {})
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        ("fails", ValueError, r"exit status 1 \(RuntimeError: CUDA out of memory\)"),
        ("lacks skull", FileNotFoundError, r"expected skull\.nii\.gz of TotalSegmentator's task"),
        ("finds no brain", ValueError, "expected to find brain in the CT, .* found no voxel"),
        ("another grid", ValueError, "brain of TotalSegmentator's task total on the study's grid"),
        ("writes no image", ValueError, r"got a file that is no image \(brain\.nii\.gz\)"),
    ],
)
def test_what_the_tool_does_wrong_is_one_sentence(program, behaviour, error, message):
    with pytest.raises(error, match=message) as caught:
        TotalSegmentator(program=program(behaviour))(*head_pair(), {})
    assert "\n" not in str(caught.value) and str(caught.value).endswith("bin/TotalSegmentator")


def test_a_tool_that_takes_too_long_is_stopped_with_what_it_started(program, tmp_path):
    provider = TotalSegmentator(program=program("sleeps"), timeout_s=5)
    started = time.monotonic()
    with pytest.raises(ValueError, match="finish within 5 s, it did not and was stopped"):
        provider(*head_pair(), {})
    assert time.monotonic() - started < 30
    child = int((tmp_path / "calls.pid").read_text())
    assert _ends(child), "a process that the program had started still runs"


def _ends(pid):
    """Whether a process is gone, or a zombie that only waits to be collected."""
    for _ in range(50):
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        ).stdout.strip()
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.1)
    return False


def test_a_missing_program_and_one_that_cannot_start_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected the program TotalSegmentator.*nowhere"):
        TotalSegmentator(program=tmp_path / "nowhere")(*head_pair(), {})
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match=r"expected TotalSegmentator to start.*broken"):
        TotalSegmentator(program=broken)(*head_pair(), {})


def test_a_windowed_ct_and_options_that_there_are_not_are_refused(program):
    mri, ct = head_pair()
    window = sitk.Cast(sitk.Clamp(ct, sitk.sitkFloat32, 0, 255), sitk.sitkUInt8)
    with pytest.raises(ValueError, match=r"CT in HU for TotalSegmentator.*masks=classical"):
        TotalSegmentator(program=program())(mri, window, {})
    for options in ({"device": "tpu"}, {"brain_from": "pet"}, {"timeout_s": 0}):
        with pytest.raises(ValueError, match="expected"):
            TotalSegmentator(**options)


def test_the_lesion_stays_the_users(program, tmp_path):
    mri, ct = head_pair()
    drawn = sitk.Cast(mri > 0, sitk.sitkUInt8)
    sitk.WriteImage(drawn, tmp_path / "lesion.nii.gz")
    provider = TotalSegmentator(program=program())
    masks = provider(mri, ct, {"lesion_mask": tmp_path / "lesion.nii.gz"})
    assert (array_of(masks.lesion) == array_of(drawn)).all()
    assert masks.provenance["lesion"]["tool"] == "file"


def test_the_package_of_this_environment_is_called_through_its_api(tmp_path, monkeypatch):
    package = tmp_path / "site" / "totalsegmentator"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "python_api.py").write_text(
        "from pathlib import Path\n"
        "import nibabel\n"
        "def totalsegmentator(input, output, task, roi_subset, fast, device):\n"
        "    given = nibabel.load(input)\n"
        "    Path(output).mkdir()\n"
        "    for roi in roi_subset:\n"
        "        low, high = {'brain': (0, 400), 'skull': (400, 5000)}[roi]\n"
        "        mask = (given.get_fdata() > low) & (given.get_fdata() <= high)\n"
        "        image = nibabel.Nifti1Image(mask.astype('uint8'), given.affine)\n"
        "        nibabel.save(image, Path(output) / f'{roi}.nii.gz')\n"
    )
    installed = tmp_path / "site" / "TotalSegmentator-2.98.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: TotalSegmentator\nVersion: 2.98.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    mri, ct = head_pair()
    masks = TotalSegmentator()(mri, ct, {})
    assert ((array_of(masks.bone) > 0) == (array_of(ct) == 1500)).all()
    assert masks.provenance["bone"]["version"] == "2.98.0"


def test_where_there_is_no_tool_masks_are_classical_and_the_log_says_so_once(
    program, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with caplog.at_level(logging.INFO):
        assert totalsegmentator_or_classical() == Classical()
    (said,) = caplog.messages
    assert "expected TotalSegmentator" in said and "masks=classical" in said
    monkeypatch.setenv("PATH", str(program().parent))
    assert isinstance(totalsegmentator_or_classical(), TotalSegmentator)


def test_a_tool_that_was_named_and_is_not_there_is_not_replaced(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the program TotalSegmentator"):
        totalsegmentator_or_classical(program=tmp_path / "TotalSegmentator")


@pytest.mark.slow
@pytest.mark.skipif(
    REAL is None,
    reason="CLINFUSE_TOTALSEGMENTATOR does not name the program of a TotalSegmentator installation",
)
def test_the_real_tool_is_called_awaited_and_placed_on_our_grid(tmp_path):
    mri, ct = head_pair()
    python = Path(REAL).with_name("python")
    build = Path(__file__).with_name("random_totalsegmentator.py")
    subprocess.run([python, build, tmp_path / "weights"], check=True)
    provider = TotalSegmentator(
        program=REAL, weights=tmp_path / "weights", brain_from="mri", fast=True, device="cpu",
        timeout_s=900,
    )  # fmt: skip
    masks = provider(mri, ct, {})
    bone = array_of(masks.bone) > 0
    true_bone = array_of(ct) == 1500
    assert dice(array_of(masks.brain) > 0, array_of(mri) == 300) > 0.9
    assert dice(bone, true_bone) > 0.8  # blocks of 16 to 37 mm, seen at 3 mm
    for axis in range(3):
        assert dice(np.flip(bone, axis), true_bone) < 0.2
    assert is_on(masks.bone, ct)
    assert masks.provenance["bone"]["version"].startswith("2.")
    assert masks.provenance["brain"]["parameters"]["models"] == [
        "Dataset852_TotalSegMRI_total_3mm_1088subj"
    ]
