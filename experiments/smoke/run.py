"""Does every method train a few steps and fuse: volumes, grey and coloured slices, of odd sizes?

python experiments/smoke/run.py FOLDER [METHOD ...]

Prints a table and ends with status 1 where a method failed. Not a result: nothing learns much.
"""

import logging
import sys
import time
import traceback
from pathlib import Path

import lightning
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import open_dict
from rich.console import Console
from rich.table import Table

from clinfuse.configuration import CONFIG_PATH, build_method, quiet_libraries, register_resolvers
from clinfuse.data.slices import colour_picture

NOT_FUSION = {"lesion_head", "distill"}  # the second needs a trained teacher
STEPS = 3

KINDS = {
    "volumes": ["phantoms.shape=[15,33,29]"],
    "grey slices": ["data=phantom_slices", "phantom_slices.kind=ct_mri"],
    "coloured slices": ["data=phantom_slices", "phantom_slices.kind=spect_mri"],
}
SLICES = ["phantom_slices.patients=6", "phantom_slices.slices=2", "phantom_slices.shape=[65,51]"]


def main(folder: str, *names: str) -> int:
    register_resolvers()
    quiet_libraries()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    known = sorted(p.stem for p in (Path(CONFIG_PATH) / "method").glob("*.yaml"))
    table = Table("method", *KINDS, title="seconds for a few steps and one fused case")
    failed = []
    for name in names or [n for n in known if n not in NOT_FUSION]:
        cells = []
        for kind, overrides in KINDS.items():
            try:
                cells.append(f"{smoke(folder, name, overrides):.1f}")
            except Exception:
                failed.append(f"{name} on {kind}")
                cells.append("[red]failed")
                traceback.print_exc()
            print(f"{name} on {kind}: {cells[-1]}", flush=True)
        table.add_row(name, *cells)
    Console().print(table)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def smoke(folder: str, name: str, overrides: list[str]) -> float:
    """Seconds that training and fusing took.

    Raises:
        ValueError: the fused image has another shape, or is not finite and in [-1, 1].
    """
    cfg = configured(folder, name, overrides)
    lightning.seed_everything(0, verbose=False)
    data = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    method = build_method(cfg)
    start = time.perf_counter()
    if method.is_trainable:
        trainer = lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(method, datamodule=data)
    data.setup("test")
    batch = next(iter(data.test_dataloader()[0]))
    with torch.no_grad():
        fused = method.eval().fuse(batch)
    seconds = time.perf_counter() - start
    if fused.shape != batch.mri.shape or not fused.isfinite().all() or fused.abs().max() > 1:
        raise ValueError(
            f"expected a finite image of shape {tuple(batch.mri.shape)} in [-1, 1], got one of "
            f"{tuple(fused.shape)} up to {fused.abs().max():.3g}"
        )
    if getattr(batch, "chroma", None) is not None:
        picture = colour_picture(fused[0], batch.chroma[0])
        if picture.mode != "RGB":
            raise ValueError(f"expected a picture in colour, got mode {picture.mode}")
    return seconds


def configured(folder: str, name: str, overrides: list[str]):
    """What ``python -m clinfuse.train`` would get for these overrides."""
    slices = SLICES if any(o.startswith("data=") for o in overrides) else []
    output = f"hydra.runtime.output_dir={folder}"
    asked = ["experiment=smoke", f"method={name}", f"cache_dir={folder}/cache", *overrides, *slices]
    with initialize_config_dir(config_dir=CONFIG_PATH, version_base="1.3"):
        cfg = compose("train", [*asked, output], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
