"""The conditional U-Net that every learned fusion here shares, in pixel or in Haar space."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn
from torch.nn import functional as F

from clinfuse.functional.haar import haar_dwt, haar_idwt
from clinfuse.networks.lean_unet import CHANNELS_LAST, evaluated, is_lean, laid_out
from clinfuse.networks.precision import convolved, with_safe_convolutions
from clinfuse.networks.windows import Windowed, part_of, with_local_norms

BYTES_PER_FEATURE = 90.0
"""That an evaluation takes at its most for each voxel of the network's grid and each feature of the
finest level, in single precision (experiments/performance/memory.py)."""

DETAIL_GAIN = 4.0
"""What detail coefficients of known volumes are multiplied by, to stand level with the rest."""


@dataclass
class Condition:
    """What is known of a study before any sampling step: encoded once, used at each.

    Attributes:
        stem: what the U-Net's first convolution makes of it, in the network's own space, padded.
        past: what goes past the U-Net into its output.
        context: tokens for cross-attention, or None.
        shape: spatial shape of the study before padding.
    """

    stem: Float[Tensor, "b c *dhw"]
    past: Float[Tensor, "b o *dhw"]
    context: Float[Tensor, "b tokens k"] | None
    shape: tuple[int, ...]

    def of_study(self, number: int) -> "Condition":
        """One study's alone."""
        one = slice(number, number + 1)
        context = None if self.context is None else self.context[one]
        return Condition(self.stem[one], self.past[one], context, self.shape)


class Stem(nn.Module):
    """The U-Net's first convolution, taken apart: what is known once a study, the state each step.

    MONAI's U-Net is handed their sum, and so this lets through what it is called with.

    Args:
        convolution: over the state's channels and then what is known.
        state_channels: how many are the state's.
    """

    def __init__(self, convolution: nn.Conv2d | nn.Conv3d, state_channels: int) -> None:
        super().__init__()
        self.conv, self.state_channels = convolution, state_channels

    def of_known(self, features: Float[Tensor, "b k *dhw"]) -> Float[Tensor, "b c *dhw"]:
        """The convolution of what is known, with the bias."""
        return convolved(
            self.conv, features, self.conv.weight[:, self.state_channels :], self.conv.bias
        )

    def of_state(self, state: Float[Tensor, "b s *dhw"]) -> Float[Tensor, "b c *dhw"]:
        """The convolution of the state."""
        return convolved(self.conv, state, self.conv.weight[:, : self.state_channels], None)

    def forward(self, x: Float[Tensor, "b c *dhw"]) -> Float[Tensor, "b c *dhw"]:
        return x


class FusionUNet(Windowed):
    """U-Net over ``state`` volumes, conditioned on MRI, CT and masks: c = {phi(I_M), phi(I_C), M}.

    MONAI's ``DiffusionModelUNet`` (Rombach et al. 2022) on the state concatenated with the raw
    sources, the masks and the features of two light encoders phi. With ``haar`` it works on the
    orthonormal Haar coefficients of all of them: nothing is lost, every axis is half as long, and
    a step costs about a third. Volumes of any size are padded inside and cropped on return.

    Fine detail is far fainter than the approximation beside it, and a group norm over both leaves
    a network little of it to see. So known volumes come in with their bands brought to one size,
    and a 1x1 convolution leads them past the U-Net, for what is linear in them.

    Both last convolutions start at zero, so an untrained network returns zeros.

    A volume that would take more than ``memory_gb`` (an attribute, None as built) is evaluated in
    windows, whose answers are blended before anything is made of them: with the same noise they
    have no seams. Where the network is not ``local``, each window's statistics are its own.

    Args:
        spatial_dims: 2 or 3.
        state_channels: volumes that change from step to step (x_t), of unit noise; may be 0.
        out_channels: volumes to return.
        known_channels: volumes known beforehand, beside the sources and masks.
        channels: features per level, each level half the size of the one before.
        encoder_channels: features of phi for each modality; 0 leaves the encoders out.
        attention_levels: where to attend; all False by default.
        cross_attention: attend at the coarsest level to tokens of the encoders' features.
        haar: work on Haar coefficients.
        local: let nothing see the whole volume: features are normalised voxel by voxel
            (``VoxelNorm``), and the coarsest level has no attention. A window then says what the
            whole would, as far as the convolutions reach.
    """

    def __init__(
        self,
        spatial_dims: int,
        state_channels: int,
        out_channels: int,
        channels: Sequence[int],
        encoder_channels: int = 8,
        num_res_blocks: int = 1,
        attention_levels: Sequence[bool] | None = None,
        cross_attention: bool = False,
        haar: bool = True,
        norm_num_groups: int = 8,
        num_rois: int = 3,
        known_channels: int = 0,
        local: bool = False,
    ) -> None:
        super().__init__()
        if local and (cross_attention or any(attention_levels or ())):
            raise ValueError("attention sees the whole volume: expected none with local=true")
        if cross_attention and not encoder_channels:
            raise ValueError("cross_attention attends to encoder features: encoder_channels is 0")
        if spatial_dims not in (2, 3):
            raise ValueError(f"expected spatial_dims 2 or 3, got {spatial_dims}")
        self.spatial_dims, self.haar = spatial_dims, haar
        self.state_channels, self.out_channels = state_channels, out_channels
        self.known_channels = known_channels
        per_volume = 2**spatial_dims if haar else 1
        self.multiple = 2 ** (len(channels) - 1) * (2 if haar else 1)
        self.context_stride = 2 ** (len(channels) - 1)

        def encoder() -> nn.Module:
            return _encoder(spatial_dims, per_volume, encoder_channels)

        self.encode_mri = encoder() if encoder_channels else None
        self.encode_ct = encoder() if encoder_channels else None
        levels = list(attention_levels or [False] * len(channels))
        if cross_attention:
            levels[-1] = True
        self.cross_attention = cross_attention
        known = per_volume * (2 + num_rois + known_channels) + 2 * encoder_channels
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.past = conv(known, per_volume * out_channels, 1)
        nn.init.zeros_(self.past.weight)
        nn.init.zeros_(cast(Tensor, self.past.bias))
        unet = DiffusionModelUNet(
            spatial_dims=spatial_dims,
            in_channels=per_volume * state_channels + known,
            out_channels=per_volume * out_channels,
            channels=tuple(channels),
            num_res_blocks=num_res_blocks,
            attention_levels=tuple(levels),
            num_head_channels=norm_num_groups,
            norm_num_groups=norm_num_groups,
            with_conditioning=cross_attention,
            cross_attention_dim=2 * encoder_channels if cross_attention else None,
        )
        stem = cast(nn.Conv2d | nn.Conv3d, cast(Any, unet.conv_in).conv)
        cast(Any, unet).conv_in = Stem(stem, per_volume * state_channels)
        if local:
            cast(Any, unet.middle_block).attention = nn.Identity()
            with_local_norms(unet)
        self.unet, self.is_local = unet, local
        self.bytes_per_voxel = BYTES_PER_FEATURE * channels[0]
        with_safe_convolutions(self)

    def encode(
        self,
        mri: Float[Tensor, "b 1 *dhw"],
        ct: Float[Tensor, "b 1 *dhw"],
        roi: Float[Tensor, "b r *dhw"],
        known: Float[Tensor, "b k *dhw"] | None = None,
    ) -> Condition:
        """Sources and masks (as floats in [0, 1]) as far as they can be known before any step.

        ``known`` are the ``known_channels`` further volumes, None where that is 0.
        """
        volumes = [mri, ct, roi, *([] if known is None else [known])]
        padded = [pad_to_multiple(volume, self.multiple) for volume in volumes]
        step = 2 if self.haar else 1
        channels: list[int] = []

        def evaluate(window: tuple[slice, ...]) -> Tensor:
            place = tuple(slice(step * part.start, step * part.stop) for part in window)
            features = self.features(*(part_of(volume, place) for volume in padded))
            parts = [cast(Stem, self.unet.conv_in).of_known(features), self.past(features)]
            channels[:] = [part.shape[1] for part in parts]
            return torch.cat(parts, 1)

        grid = [size // step for size in padded[0].shape[2:]]
        out = self.answer(evaluate, grid, self.context_stride, len(mri))
        stem, past = out.split(channels, 1)
        return Condition(stem, past, self._context(mri, ct), tuple(mri.shape[2:]))

    def _context(self, mri: Tensor, ct: Tensor) -> Tensor | None:
        if not self.cross_attention or self.encode_mri is None or self.encode_ct is None:
            return None
        phi = [self.encode_mri(self._levelled(mri)), self.encode_ct(self._levelled(ct))]
        return _pool(torch.cat(phi, 1), self.context_stride).flatten(2).transpose(1, 2)

    def features(
        self,
        mri: Float[Tensor, "b 1 *dhw"],
        ct: Float[Tensor, "b 1 *dhw"],
        roi: Float[Tensor, "b r *dhw"],
        known: Float[Tensor, "b k *dhw"] | None = None,
    ) -> Float[Tensor, "b c *half"]:
        """All that is known, in the network's own space, padded; arguments as of ``encode``."""
        volumes = [mri, ct, roi, *([] if known is None else [known])]
        parts = [self._levelled(volume) for volume in volumes]
        if is_lean(self.unet, mri):
            parts = [laid_out(part) for part in parts]
        mri_coefficients, ct_coefficients = parts[:2]
        if self.encode_mri is not None and self.encode_ct is not None:
            parts += [self.encode_mri(mri_coefficients), self.encode_ct(ct_coefficients)]
        return torch.cat(parts, 1)

    def forward(
        self,
        state: Float[Tensor, "bk s *dhw"] | None,
        condition: Condition,
        alpha_bar_t: Float[Tensor, " bk"] | None = None,
    ) -> Float[Tensor, "bk o *dhw"]:
        """Network outputs on the study's own grid.

        Args:
            state: ``state_channels`` volumes, None where that is 0; of every study as many times
                as the batch is longer than the condition's, side by side (a a b b).
            condition: from ``encode``.
            alpha_bar_t: signal power kept; None stands for a clean state.
        """
        if is_lean(self.unet, condition.stem):
            return self._sampled(state, condition, alpha_bar_t)
        stem, context = condition.stem, condition.context
        coefficients = None if state is None else self._analyse(state)
        size = len(stem) if state is None else len(state)
        if alpha_bar_t is None:
            alpha_bar_t = stem.new_ones(size)
        angle = noise_angle(alpha_bar_t.float())
        if context is not None and size > len(context):
            context = context.repeat_interleave(size // len(context), 0)

        def evaluate(window: tuple[slice, ...]) -> Tensor:
            x = part_of(stem, window)
            if coefficients is not None:
                of_state = cast(Stem, self.unet.conv_in).of_state(part_of(coefficients, window))
                x = _added(of_state, x)
            if not torch.is_grad_enabled():  # a fifth faster in bfloat16 (experiments/performance)
                x = x.to(memory_format=CHANNELS_LAST[self.spatial_dims])
            return self.unet(x, angle, context=context)

        out = self.answer(evaluate, stem.shape[2:], self.context_stride, size)
        out = _added(out, condition.past)
        if self.haar:
            out = haar_idwt(out if self.state_channels else self._unlevelled(out))
        return crop(out, condition.shape)

    def _sampled(
        self, state: Tensor | None, condition: Condition, alpha_bar_t: Tensor | None
    ) -> Tensor:
        """``forward`` of one member after the other, each in ``lean_unet``'s few passes."""
        studies = len(condition.stem)
        size = studies if state is None else len(state)
        if alpha_bar_t is None:
            alpha_bar_t = condition.stem.new_ones(size)
        angles = noise_angle(alpha_bar_t.float()).split(1)
        outs = []
        for number, angle in enumerate(angles):
            known = condition.of_study(number * studies // size)
            of_one = None if state is None else state[number : number + 1]
            outs.append(self._sample(of_one, known, angle))
        return torch.cat(outs)

    def _sample(self, state: Tensor | None, known: Condition, angle: Tensor) -> Tensor:
        coefficients = None if state is None else laid_out(self._analyse(state))

        def evaluate(window: tuple[slice, ...]) -> Tensor:
            x = part_of(known.stem, window)
            if coefficients is not None:
                stem = cast(Stem, self.unet.conv_in)
                x = stem.of_state(part_of(coefficients, window)).add_(x)
            return evaluated(self.unet, laid_out(x), angle)

        out = self.answer(evaluate, known.stem.shape[2:], self.context_stride, 1)
        out += known.past
        if not self.haar:
            return crop(out, known.shape)
        if not self.state_channels:  # as ``_unlevelled``
            out.unflatten(1, (self.out_channels, -1))[:, :, 0] *= 2 ** (self.spatial_dims / 2)
        return crop(haar_idwt(out), known.shape)

    def _analyse(self, volume: Tensor) -> Tensor:
        padded = pad_to_multiple(volume, self.multiple)
        return haar_dwt(padded) if self.haar else padded

    def _levelled(self, volume: Tensor) -> Tensor:
        """The volume's coefficients: the approximation as a local mean, details DETAIL_GAIN up."""
        coefficients = self._analyse(volume)
        if not self.haar:
            return coefficients
        bands = coefficients.unflatten(1, (volume.shape[1], -1))
        approximation, details = bands[:, :, :1], bands[:, :, 1:]
        mean = approximation * 2 ** (-self.spatial_dims / 2)
        return torch.cat([mean, details * DETAIL_GAIN], 2).flatten(1, 2)

    def _unlevelled(self, out: Tensor) -> Tensor:
        """Coefficients of images from outputs of one size: the approximation from a local mean.

        A network with a state predicts noise or what is left of it, whose bands are level already.
        """
        bands = out.unflatten(1, (self.out_channels, -1))
        approximation, details = bands[:, :, :1], bands[:, :, 1:]
        return torch.cat([approximation * 2 ** (self.spatial_dims / 2), details], 2).flatten(1, 2)


def noise_angle(alpha_bar_t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The noise level as an angle from 0 (clean) to 1000 (pure noise), for the time embedding.

    Under the cosine schedule this is about the integer step t of T = 1000, and it means the same
    under any other schedule (Salimans & Ho 2022, appendix D: alpha = cos(phi)).
    """
    return torch.arccos(alpha_bar_t.clamp(0, 1).sqrt()) * (2000 / torch.pi)


def _added(of_each: Float[Tensor, "bk c *dhw"], of_study: Float[Tensor, "b c *dhw"]) -> Tensor:
    """The sum, what belongs to a study added to all its neighbours in the batch."""
    if len(of_each) == len(of_study):
        return of_each + of_study
    return (of_each.unflatten(0, (len(of_study), -1)) + of_study[:, None]).flatten(0, 1)


def pad_to_multiple(volume: Tensor, multiple: int | Sequence[int]) -> Tensor:
    """The volume with its last voxels repeated until every axis is a multiple of ``multiple``.

    Args:
        volume: ``b c *dhw``.
        multiple: one for all axes, or one each.
    """
    each = [multiple] * (volume.ndim - 2) if isinstance(multiple, int) else multiple
    missing = [-size % k for size, k in zip(volume.shape[2:], each, strict=True)]
    if not any(missing):
        return volume
    padding = [side for amount in reversed(missing) for side in (0, amount)]
    return F.pad(volume, padding, mode="replicate")


def crop(volume: Tensor, shape: Sequence[int]) -> Tensor:
    """The first voxels along each spatial axis: undoes ``pad_to_multiple``."""
    for axis, size in enumerate(shape, start=2):
        volume = volume.narrow(axis, 0, size)
    return volume


def _encoder(spatial_dims: int, in_channels: int, features: int) -> nn.Module:
    conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
    return nn.Sequential(
        conv(in_channels, features, 3, padding=1),
        nn.SiLU(),
        conv(features, features, 3, padding=1),
        nn.SiLU(),
    )


def _pool(features: Tensor, stride: int) -> Tensor:
    pool = F.avg_pool3d if features.ndim == 5 else F.avg_pool2d
    return pool(features, stride)
