"""What is measured of this project: the denoiser by itself, and a whole method, both untrained.

Not run by hand: the benchmarks beside it import it. Both are built as ``clinfuse.train`` builds
them, from ``conf``; overrides are Hydra's (``network=pixel``).
"""

from collections.abc import Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from measure import DEVICE
from omegaconf import DictConfig
from torch import Tensor, nn

from clinfuse.configuration import CONFIG_PATH, build_method, quiet_libraries, register_resolvers
from clinfuse.diffusion.process import q_sample, v_from, x0_from_v
from clinfuse.diffusion.samplers.ddim import ddim
from clinfuse.diffusion.schedule import cosine, levels_for
from clinfuse.losses.diffusion import diffusion_loss
from clinfuse.networks.fusion_unet import Condition
from clinfuse.types import FusionBatch


def configuration(overrides: Sequence[str] = ()) -> DictConfig:
    """What ``python -m clinfuse.train preset=stroke`` would run with these overrides."""
    register_resolvers()
    quiet_libraries()
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return compose("train", ["preset=stroke", *overrides])


def untrained_method(overrides: Sequence[str] = (), seed: int = 0) -> Any:
    """The whole method with random weights, its last layers too, so that nothing is zero."""
    torch.manual_seed(seed)
    method = build_method(configuration(overrides))
    waken(method)
    return method.to(DEVICE).eval()


def waken(network: nn.Module, scale: float = 0.02) -> None:
    """Give every convolution that starts at zero, as last ones do, small random weights."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and not module.weight.any():
            nn.init.normal_(module.weight, std=scale)


class WaveletDenoiser:
    """The third stage of the method by itself: v-prediction of F in Haar space, no anchor.

    What ``RoiDiffusion`` does with ``anchor=none``: the network gets the sources, the masks, and a
    mean of 0 and a log scale of 0.
    """

    name = "ours"

    def __init__(self, overrides: Sequence[str] = (), seed: int = 0) -> None:
        torch.manual_seed(seed)
        build = instantiate(configuration(overrides).network, _convert_="all")
        self.network = build(state_channels=1, known_channels=2, out_channels=1).to(DEVICE).eval()
        self.alpha_bars = cosine().to(DEVICE)

    def encoded(self, batch: FusionBatch) -> Condition:
        mean = torch.zeros_like(batch.mri)
        known = torch.cat([mean, torch.ones_like(mean).log()], 1)
        return self.network.encode(batch.mri, batch.ct, batch.roi.to(mean.dtype), known)

    def velocity(self, batch: FusionBatch, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and true, of the reference noised to step t."""
        assert batch.reference is not None
        alpha_bar_t = self.alpha_bars[t]
        x_t = q_sample(batch.reference, eps, alpha_bar_t)
        prediction = self.network(x_t, self.encoded(batch), alpha_bar_t).float()
        return prediction, v_from(batch.reference, eps, alpha_bar_t)

    def loss(self, batch: FusionBatch, t: Tensor, eps: Tensor) -> Tensor:
        """Mean squared error of v over the voxels."""
        return diffusion_loss(*self.velocity(batch, t, eps)).mean()

    @torch.no_grad()
    def sample(self, batch: FusionBatch, x_T: Tensor, steps: int) -> Tensor:
        """F after a DDIM walk of so many steps; what is known is encoded once."""
        condition = self.encoded(batch)

        def denoise(x_t: Tensor, alpha_bar_t: Tensor) -> Tensor:
            return x0_from_v(x_t, self.network(x_t, condition, alpha_bar_t).float(), alpha_bar_t)

        return ddim(denoise, x_T, levels_for(self.alpha_bars, steps))
