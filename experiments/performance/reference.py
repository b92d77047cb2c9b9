"""The straightforward reference: MONAI's U-Net in voxel space, with its inferer and schedulers.

python experiments/performance/reference.py prints the widths that equal our number of weights.

Sources and masks are concatenated to the noisy volume as channels, which is what MONAI's inferer
calls ``concat``. The schedule is cosine and the prediction v, as ours.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product

import torch
from measure import DEVICE
from monai.inferers import DiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from ours import WaveletDenoiser
from torch import Tensor, nn
from torch.nn import functional as F

from clinfuse.networks.precision import with_safe_convolutions
from clinfuse.types import ROI_NAMES, FusionBatch

OUR_WIDTHS = (32, 48, 64, 96)
"""Of ``conf/network/haar.yaml``: the search looks around them."""


class PixelReference:
    """A conditional diffusion model of F as MONAI's tutorials build one.

    Its convolutions are ``with_safe_convolutions``: without them bfloat16 training on a CPU gives
    NaN at a coarsest level of one or two voxels (``clinfuse.networks.precision``).
    """

    name = "reference"

    def __init__(self, widths: Sequence[int] | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.widths = tuple(widths or equal_widths())
        self.network = with_safe_convolutions(pixel_unet(self.widths)).to(DEVICE)
        diffusion = {"schedule": "cosine", "prediction_type": "v_prediction"}
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, **diffusion)
        self.walk = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, **diffusion)
        self.inferer = DiffusionInferer(self.scheduler)
        self.multiple = 2 ** (len(self.widths) - 1)

    def condition(self, batch: FusionBatch) -> Tensor:
        return torch.cat([batch.mri, batch.ct, batch.roi.to(batch.mri.dtype)], 1)

    def velocity(self, batch: FusionBatch, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and true, of the reference noised to step t."""
        assert batch.reference is not None
        x_0, eps_padded = self._padded(batch.reference), self._padded(eps)
        prediction = self.inferer(
            inputs=x_0,
            diffusion_model=self.network,
            noise=eps_padded,
            timesteps=t,
            condition=self._padded(self.condition(batch)),
            mode="concat",
        ).float()
        inside = tuple(slice(size) for size in eps.shape[2:])
        true = self.scheduler.get_velocity(batch.reference, eps, t)
        return prediction[:, :, *inside], true

    def loss(self, batch: FusionBatch, t: Tensor, eps: Tensor) -> Tensor:
        """Mean squared error of v over the voxels."""
        prediction, true = self.velocity(batch, t, eps)
        return F.mse_loss(prediction, true)

    @torch.no_grad()
    def sample(self, batch: FusionBatch, x_T: Tensor, steps: int) -> Tensor:
        """F after a DDIM walk of so many steps."""
        self.walk.set_timesteps(steps, device=x_T.device)
        fused = self.inferer.sample(
            input_noise=self._padded(x_T),
            diffusion_model=self.network,
            scheduler=self.walk,
            conditioning=self._padded(self.condition(batch)),
            mode="concat",
            verbose=False,
        )
        return fused[:, :, *(slice(size) for size in x_T.shape[2:])]

    def _padded(self, volume: Tensor) -> Tensor:
        """With zeros behind, to sizes that the U-Net can halve."""
        missing = [-size % self.multiple for size in volume.shape[2:]]
        sides = [side for amount in reversed(missing) for side in (0, amount)]
        return F.pad(volume, sides) if any(missing) else volume


def pixel_unet(widths: Sequence[int]) -> DiffusionModelUNet:
    """MONAI's U-Net on the noisy volume, the two sources and the masks; built as ours builds it."""
    return DiffusionModelUNet(
        spatial_dims=3,
        in_channels=1 + 2 + len(ROI_NAMES),
        out_channels=1,
        channels=tuple(widths),
        num_res_blocks=1,
        attention_levels=(False,) * len(widths),
        num_head_channels=8,
        norm_num_groups=8,
    )


@cache
def equal_widths(tolerance: float = 0.02) -> tuple[int, ...]:
    """Of all widths that give as many weights as ours has, those nearest to ours.

    Raises:
        ValueError: none does within the tolerance.
    """
    wanted = weights_of(WaveletDenoiser().network)
    around = [range(width - 16, width + 17, 8) for width in OUR_WIDTHS]
    rising = [w for w in product(*around) if all(a < b for a, b in pairwise(w))]
    rising.sort(key=lambda w: sum(abs(a - b) for a, b in zip(w, OUR_WIDTHS, strict=True)))
    closest: tuple[float, tuple[int, ...]] = (float("inf"), ())
    for widths in rising[:60]:
        with torch.device("meta"):
            off = abs(weights_of(pixel_unet(widths)) / wanted - 1)
        if off <= tolerance:
            return widths
        closest = min(closest, (off, widths))
    raise ValueError(f"expected widths within {tolerance:.0%} of {wanted} weights, got {closest}")


def weights_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


if __name__ == "__main__":
    own, other = WaveletDenoiser(), PixelReference()
    ours, theirs = weights_of(own.network), weights_of(other.network)
    print(
        f"ours: {ours} weights; reference: {theirs} ({theirs / ours - 1:+.1%}) with {other.widths}"
    )
