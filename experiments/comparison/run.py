"""Trains every method of a set, then scores all of them and the rules on the same test cases.

python experiments/comparison/run.py SET DATA FOLDER [METHOD ...]

SET is ct_mri, spect_mri or phantom. DATA holds the sets of 2-D pairs (harvard_aanlib, roadscene);
phantoms are drawn, and need none ("-"). Runs go to FOLDER/SET/METHOD, the scores to
FOLDER/SET/cases.csv. One training at a time; what has finished is not done again, so that the same
command goes on where it was stopped. With METHODs only these are trained, and nothing is scored.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Training:
    """How a method is trained: on top of its configuration, and for how many epochs.

    Attributes:
        settings: overrides.
        epochs: of ``DRAWS`` draws.
        after: set and method whose run it starts from.
    """

    settings: tuple[str, ...] = ()
    epochs: int = 10
    after: tuple[str, str] | None = None


DRAWS = 200
QUIET = (
    "test=false",
    "interval_level=null",
    "logger=csv",
    "callbacks.model_draws=null",
    "trainer.check_val_every_n_epoch=1000",
)
SLICES = (
    "data.batch_size=4",
    "data.patch_shape=[128,128]",
    f"data.draws_per_epoch={DRAWS}",
    "callbacks.ema.decay=0.98",
    "network.channels=[16, 24, 32, 48]",
    "network.encoder_channels=4",
    *QUIET,
)

DATA = {
    "ct_mri": (
        "data=harvard_ct_mri",
        "data.splits={train: [2, 20, 32, 34, 37, 41], val: [], test: [28, 33]}",
    ),
    "spect_mri": (
        "data=harvard_spect_mri",
        "data.splits={train: [11, 15, 18, 22, 25, 3], val: [], test: [28, 35]}",
    ),
    "vis_ir": ("data=visible_infrared", "data.splits={train: [all], val: [], test: []}"),
    "phantom": (
        "data=phantom",
        "phantoms.cases=24",
        "data.draws_per_epoch=24",
        "callbacks.ema.decay=0.9",
    ),
}
"""The cases of each set. ``make_splits`` with seed 42 has drawn the test patients (of CT-MRI a
quarter); of SPECT-MRI's eight training patients the first six by name are taken."""

ROOTS = {"ct_mri": "harvard_aanlib", "spect_mri": "harvard_aanlib", "vis_ir": "roadscene"}

HALF_WIDTH = ("+resnet_width=32",)
"""The paper's ResNet-34 twice are 4 s a step on two cores, and start at random here anyway."""

U_NET = ("optimizer.lr=1.5e-3",)
OURS_2D = ("experiment=pictures",)
SLICE_METHODS = {
    "weighted_by_roi": Training(epochs=2),
    "trainable_wavelet": Training(epochs=10),
    "resnet_fusion": Training(epochs=6),
    "transfer_fusion": Training(
        ("experiment=transfer_medical", *HALF_WIDTH, "optimizer.lr=1e-4", "freeze_epochs=1"),
        4,
        ("vis_ir", "transfer_fusion"),
    ),
    "diff_fccf": Training(("optimizer.lr=2e-3",), 10),
    "ttt_fusion": Training(U_NET, 8),
    "deterministic_unet": Training((*OURS_2D, "method=deterministic_unet"), 20),
    "diffusion_unguided_pictures": Training((*OURS_2D, "method=diffusion_unguided_pictures"), 25),
    "clinfuse_pictures": Training(OURS_2D, 25),
}
VOLUME_METHODS = {
    "weighted_by_roi": Training(epochs=1),
    "trainable_wavelet": Training(epochs=4),
    "resnet_fusion": Training(epochs=1),
    "transfer_fusion": Training((*HALF_WIDTH, "optimizer.lr=5e-4"), 1),
    "diff_fccf": Training(("optimizer.lr=1e-3",), 2),
    "ttt_fusion": Training(U_NET, 3),
    "deterministic_unet": Training(("experiment=demo",), 4),
    "diffusion_unguided": Training(("experiment=demo",), 8),
    "clinfuse": Training(("experiment=demo",), 8),
}
METHODS = {
    "ct_mri": SLICE_METHODS,
    "spect_mri": {
        name: replace(training, epochs=max(round(0.6 * training.epochs), 2))
        for name, training in SLICE_METHODS.items()
    },
    "phantom": VOLUME_METHODS,
    "vis_ir": {
        "transfer_fusion": Training(
            ("experiment=transfer_visible_infrared", *HALF_WIDTH, "optimizer.lr=5e-4"), 4
        )
    },
}
RULES = (
    "average",
    "weighted",
    "maximum",
    "laplacian_pyramid",
    "laplacian_energy",
    "wavelet",
    "mask_composite",
)
SLICE_RULES = (*RULES, "most_kept")
"""``most_kept`` looks at a slice for seconds, at a volume for minutes."""


def main(which: str, data: str, folder: str, *only: str) -> None:
    if which not in METHODS:
        sys.exit(f"expected a set of {', '.join(METHODS)}, got {which!r}")
    for name in only or METHODS[which]:
        train(which, name, data, Path(folder))
    if not only and which != "vis_ir":
        evaluate(which, data, Path(folder))


def train(which: str, name: str, data: str, folder: Path) -> Path:
    """The run's folder, trained by now; a run without its last checkpoint is begun again."""
    run, training = folder / which / name, METHODS[which][name]
    if (run / "done").exists():
        return run
    shutil.rmtree(run, ignore_errors=True)
    arguments = [*DATA[which], *(QUIET if which == "phantom" else SLICES), *training.settings]
    if not any(s.startswith(("method=", "experiment=pictures")) for s in training.settings):
        arguments.append(f"method={name}")
    if which != "phantom":
        arguments.append(f"data.root={Path(data) / ROOTS[which]}")
    if training.after is not None:
        other, first = training.after
        arguments.append(f"method.start={train(other, first, data, folder)}")
    arguments += [f"trainer.max_epochs={training.epochs}", f"hydra.run.dir={run}"]
    command("clinfuse.train", *arguments)
    (run / "done").touch()
    return run


def evaluate(which: str, data: str, folder: Path) -> None:
    """Scores of all methods on the test cases of the set."""
    if (folder / which / "cases.csv").exists():
        return
    runs = [str(train(which, name, data, folder)) for name in METHODS[which]]
    rules, amplitudes = (RULES, [0, 2, 4]) if which == "phantom" else (SLICE_RULES, [0])
    command(
        "clinfuse.evaluate",
        f"run=[{','.join(reversed(runs))}]",
        f"baselines=[{','.join(rules)}]",
        f"misregistration_mm={amplitudes}",
        "pictures_at_mm=0" if which != "phantom" else "pictures_at_mm=2",
        f"hydra.run.dir={folder / which}",
    )


def command(module: str, *arguments: str) -> None:
    print(f"python -m {module} " + " ".join(f"'{a}'" for a in arguments), flush=True)
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
