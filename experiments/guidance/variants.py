"""Sample the same test cases, from the same noise and network, under one guidance after another.

python experiments/guidance/variants.py RUN LESION_HEAD OUT.csv [DETERMINISTIC_RUN [MM,MM]]

With amplitudes only unguided and default are sampled, at those ("" names no regression).

Every (case, misregistration) is anchored once, and each variant sampled from that anchor. The
cohort is a fresh one: the 21 test cases of 140 phantoms of seed 2, which trained neither the run
nor the head. Where Eq. 4 does not read the spread, the guided mean does not depend on what the
denoiser says about the members (their noise sums to 0, centred_estimate takes their mean from it,
and the steps down U sum to 0), so there two members are walked with a network that says nothing;
``check`` compares that with the whole thing.
"""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from clinfuse.callbacks.recorder import automatic_lesion
from clinfuse.configuration import (
    CONFIG_PATH,
    lesion_head_of,
    quiet_libraries,
    register_resolvers,
    run_config,
    trained_method,
)
from clinfuse.functional.psnr import psnr
from clinfuse.functional.ssim import ssim
from clinfuse.functional.surface import NO_SURFACE_MM, dice, hd95, nsd, signed_distance_mm
from clinfuse.losses.roi import ClinicalRoiLoss
from clinfuse.methods.objective import lesion_probability
from clinfuse.metrics.regional import LESION_THRESHOLD, brightness
from clinfuse.metrics.suite import case_metrics

INF = float("inf")
EQ_2 = {"brain": (1, 0, 0), "bone": (0, 1, 0), "lesion": (0, 0, 1), "all": (1, 1, 1)}
"""Which of alpha, beta and gamma are on."""


ENDS = ("off", "default")
PLACES = (
    "all + fidelity", "followed as a sum", "steps in the residual", "CT as given", "CT registered"
)  # fmt: skip
TERMS = ("brain", "bone", "lesion", "all", "all + Eq. 4", "all + grad U")
SAMPLED = {0.0: (*ENDS, *PLACES, *TERMS), 2.0: (*ENDS, *PLACES)}
"""What is sampled at which misregistration; elsewhere the ends."""

AMPLITUDES = (0.0, 2.0, 4.0, 1.0)


def few_metrics(fused, batch, probability, _spread):
    """What each term of Eq. 2 is about, without the metrics that take their time."""
    mri, ct, roi = batch.truth()
    brain, bone, lesion = roi.split(1, 1)
    bright, spacing_mm, found = brightness(fused), batch.spacing_mm, probability > LESION_THRESHOLD
    rows = (
        ("brain", "ssim", ssim(bright, brightness(mri), brain, spacing_mm)),
        ("bone", "psnr", psnr(fused, ct, bone)),
        ("bone", "ssim", ssim(bright, brightness(ct), bone, spacing_mm)),
        ("lesion", "dice", dice(found, lesion)),
        ("lesion", "nsd", nsd(found, lesion, spacing_mm, 2.0)),
        ("lesion", "hd95", hd95(found, lesion, spacing_mm)),
    )
    return [[(region, metric, value.item()) for region, metric, value in rows]]


def variants(own, weights, fidelity):
    """Name -> (alpha, beta, gamma, fidelity, guidance). ``own`` is the default."""
    plain = replace(own, kappa=None, eta_u=0.0)
    none = (0.0, 0.0)
    rows = {"off": (*weights, none, replace(own, eta=0.0, eta_u=0.0))}
    for name, on in EQ_2.items():
        used = [w * o for w, o in zip(weights, on, strict=True)]
        rows[name] = (*used, none, plain)
    rows["all + fidelity"] = (*weights, fidelity, plain)
    rows["all + Eq. 4"] = (*weights, none, replace(plain, kappa=own.kappa))
    rows["all + grad U"] = (*weights, none, replace(plain, eta_u=own.eta_u))
    rows["default"] = (*weights, fidelity, own)
    for name, change in {
        "followed as a sum": {"by_region": False},
        "steps in the residual": {"image_steps": [False, False, False]},
        "CT as given": {"tolerance_mm": INF},
        "CT registered": {"tolerance_mm": 0.0},
    }.items():
        rows[name] = (*weights, fidelity, replace(plain, **change))
    return rows


@torch.no_grad()
def main(run, lesion_head, out, deterministic=None, ends_at=""):
    amplitudes = [float(mm) for mm in ends_at.split(",")] if ends_at else AMPLITUDES
    register_resolvers()
    quiet_libraries()
    cfg = run_config(run)
    cfg.phantoms.cases, cfg.phantoms.seed = 140, 2
    cfg.guidance = todays_guidance(cfg.guidance)
    data = instantiate(cfg.data, misregistration_mm=list(amplitudes), _convert_="all")
    data.prepare_data()
    method, head = trained_method(run, cfg), lesion_head_of(lesion_head)
    method.lesion_head = head
    regression = trained_method(deterministic) if deterministic else None
    weights = (method.guidance_loss.alpha, method.guidance_loss.beta, method.guidance_loss.gamma)
    own, fidelity = method.guidance, method.guidance_loss.fidelity
    every = variants(own, weights, fidelity)
    table = Path(out).open("w", newline="")  # noqa: SIM115
    writer = csv.writer(table)
    writer.writerow(
        ["case_id", "misregistration_mm", "mask_source", "variant", "roi", "metric", "value"]
    )

    def score(batch, amplitude, source, name, draws):
        fused, spread = (
            draws.mean(0).clamp(-1, 1),
            draws.clamp(-1, 1).std(0, correction=len(draws) > 1),
        )
        full = case_metrics if name in ("default", "deterministic_unet") else few_metrics
        spread = spread if len(draws) > 2 else None
        seen = lesion_probability(head, fused, batch.brain)
        for roi, metric, value in full(fused, batch, seen, spread)[0]:
            writer.writerow([batch.case_id[0], amplitude, source, name, roi, metric, value])

    for amplitude, loader in zip(amplitudes, data.test_dataloader(), strict=True):
        for batch in loader:
            anchor = method.anchor(batch)
            for name in ENDS if ends_at else SAMPLED.get(amplitude, ENDS):
                alpha, beta, gamma, faithful, method.guidance = every[name]
                method.guidance_loss = ClinicalRoiLoss(
                    alpha, beta, gamma, (1.0, 1.0, 0.5), 2.0, faithful
                )
                score(batch, amplitude, "expert", name, sampled(method, batch, anchor, name))
            if regression is not None:
                score(batch, amplitude, "none", "deterministic_unet", regression.ensemble(batch))
            for source in ("automatic", "none") if amplitude == 0 and not ends_at else ():
                masked = with_lesion(batch, head, source)
                given = method.anchor(masked)
                for name in ("off", "all + fidelity"):
                    *weights, faithful, method.guidance = every[name]
                    method.guidance_loss = ClinicalRoiLoss(*weights, (1.0, 1.0, 0.5), 2.0, faithful)
                    score(batch, amplitude, source, name, sampled(method, masked, given, name))
            table.flush()
            print(amplitude, batch.case_id[0], flush=True)


def todays_guidance(of_run):
    """The strengths of this checkout, with the weights of the run's preset."""
    default = OmegaConf.load(Path(CONFIG_PATH) / "guidance" / "default.yaml")
    return OmegaConf.merge(of_run, default)  # in which alpha, beta and gamma are missing


class Silent(torch.nn.Module):
    """A denoiser that predicts v = 0."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def encode(self, *sources):
        return self.network.encode(*sources)

    def forward(self, x_t, condition, alpha_bar_t):
        return torch.zeros_like(x_t)


def sampled(method, batch, anchor, name):
    """The ensemble, or where only its mean is asked for two members with that mean."""
    if name == "default" or (method.guidance.kappa and method.guidance.eta):
        return method.sample(batch, anchor)
    network, members = method.network, method.members
    method.network, method.members = Silent(network), 2
    draws = method.sample(batch, anchor)
    method.network, method.members = network, members
    check(method, batch, anchor, draws)
    return draws


def check(method, batch, anchor, draws, seen=[]):  # noqa: B006
    """Once: the mean of two members that nothing was said about is the ensemble's."""
    if not seen:
        apart = (method.sample(batch, anchor).mean(0) - draws.mean(0)).abs().max().item()
        print(f"largest difference between the two means: {apart:.1e}", flush=True)
        assert apart < 5e-3  # of a range of 2
        seen.append(apart)


def with_lesion(batch, head, source):
    """The batch with another lesion mask than the expert's, for the anchor and for guidance."""
    lesion = torch.zeros_like(batch.lesion)
    distance_mm = torch.full_like(batch.lesion_distance_mm, NO_SURFACE_MM)
    if source == "automatic":
        lesion = automatic_lesion(batch, head)
        distance_mm = signed_distance_mm(lesion, batch.spacing_mm).float()
    roi = torch.cat([batch.roi[:, :2], lesion], 1)
    return replace(batch, roi=roi, lesion_distance_mm=distance_mm)


if __name__ == "__main__":
    main(*sys.argv[1:])
