"""What one evaluation of each network takes for a voxel: what windows are chosen by.

python experiments/performance/memory.py

The most that an evaluation added to what was resident, over the voxels of the network's own grid
(an eighth of the volume's), and for the U-Nets over the features of their finest level.
"""

import torch
from measure import peak_memory

from clinfuse.networks.fusion_unet import BYTES_PER_FEATURE, FusionUNet
from clinfuse.networks.rigid_registration import SynthesisRegistration
from clinfuse.networks.source_denoiser import SourceDenoiser

CHANNELS = (32, 48, 64, 96)


def main() -> None:
    torch.set_num_threads(1)
    unet = FusionUNet(3, 1, 1, channels=CHANNELS, encoder_channels=8, known_channels=2)
    registration, denoiser = SynthesisRegistration(3), SourceDenoiser(3)
    features = registration.network.conv_0.conv_0.conv.out_channels
    assumed = registration.bytes_per_voxel / features
    for shape in ((32, 128, 128), (32, 192, 192)):
        volume, roi = torch.randn(1, 1, *shape), torch.ones(1, 3, *shape)
        voxels = volume.numel() / 8
        for is_half in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_half):
                condition = unet.encode(volume, volume, roi, torch.cat([volume, volume], 1))
                calls = {
                    f"U-Net, a feature (assumed {BYTES_PER_FEATURE:g})": (
                        lambda c=condition, x=volume: unet(x, c),
                        CHANNELS[0],
                    ),
                    f"registration, a feature (assumed {assumed:g})": (
                        lambda x=volume, m=roi: registration.synthesise(x, m[:, :1]),
                        features,
                    ),
                    f"source denoiser (assumed {denoiser.bytes_per_voxel:g})": (
                        lambda x=volume: denoiser(x),
                        1,
                    ),
                }
                for name, (call, share) in calls.items():
                    with peak_memory() as taken:
                        call()
                    each = taken.mib * 2**20 / voxels / share
                    print(f"{shape} {'bfloat16' if is_half else 'single'}: {name}: {each:.0f}")


if __name__ == "__main__":
    main()
