"""Graph convolutions on the voxel grid: Chebyshev polynomials of its Laplacian, by stencils."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def scaled_laplacian(x: Float[Tensor, "b c *dhw"]) -> Float[Tensor, "b c *dhw"]:
    """L~ x, L~ = 2 L / lambda_max - I, of the graph that joins each voxel to its next ones.

    L = I - D^(-1/2) A D^(-1/2) is the normalised Laplacian, with 2 neighbours an axis and fewer at
    the border. A grid is bipartite, so its lambda_max is exactly 2 (Chung 1997, Lemma 1.7) and L~
    is -D^(-1/2) A D^(-1/2): sums of neighbours, in time and memory proportional to the voxels.
    A voxel with no neighbour at all gives 0.
    """
    degree = _neighbour_sum(torch.ones_like(x[:1, :1]))
    root = degree.clamp(min=1).rsqrt()
    return -root * _neighbour_sum(root * x)


def chebyshev_terms(x: Float[Tensor, "b c *dhw"], order: int) -> Float[Tensor, "b kc *dhw"]:
    """T_0(L~) x, T_1(L~) x, ... side by side as channels, ``order`` of them.

    T_k = 2 L~ T_(k-1) - T_(k-2) (Defferrard et al. 2016, Sec. 2.1). The k-th reaches k voxels far.
    """
    terms = [x]
    if order > 1:
        terms.append(scaled_laplacian(x))
    while len(terms) < order:
        terms.append(2 * scaled_laplacian(terms[-1]) - terms[-2])
    return torch.cat(terms, 1)


class ChebyshevConvolution(nn.Module):
    """y = sum over k of W_k T_k(L~) x + b: a filter on the grid's graph.

    Defferrard et al. (2016), Eq. 4. Takes grids of any size, and knows nothing of direction: what
    lies left and what lies right of a voxel weigh alike.

    Args:
        spatial_dims: 2 or 3.
        in_channels: features of a voxel.
        out_channels: of the result.
        order: K, terms of the polynomial.

    Raises:
        ValueError: an order below 1.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, order: int) -> None:
        super().__init__()
        if order < 1:
            raise ValueError(f"expected a Chebyshev order of at least 1, got {order}")
        self.order = order
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.mix = conv(order * in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c *dhw"]) -> Float[Tensor, "b o *dhw"]:
        mixed: Tensor = self.mix(chebyshev_terms(x, self.order))
        return mixed


class ChebyshevBlock(nn.Module):
    """Residual block of two graph convolutions, told the noise level: a U-Net's bottleneck.

    Called as MONAI calls a ``middle_block``. The second convolution starts at zero, so that an
    untrained block hands on what it gets.

    Args:
        spatial_dims: 2 or 3.
        channels: features of a voxel.
        embedding_channels: of the noise level's embedding.
        order: K of both convolutions.
        norm_num_groups: of the group norms.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        embedding_channels: int,
        order: int,
        norm_num_groups: int = 8,
    ) -> None:
        super().__init__()
        self.first_norm = nn.GroupNorm(norm_num_groups, channels)
        self.first = ChebyshevConvolution(spatial_dims, channels, channels, order)
        self.embed = nn.Linear(embedding_channels, channels)
        self.second_norm = nn.GroupNorm(norm_num_groups, channels)
        self.second = ChebyshevConvolution(spatial_dims, channels, channels, order)
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        hidden_states: Float[Tensor, "b c *dhw"],
        temb: Float[Tensor, "b e"],
        context: Tensor | None = None,
    ) -> Float[Tensor, "b c *dhw"]:
        """The features, filtered; ``context`` is not attended to."""
        h = self.first(nn.functional.silu(self.first_norm(hidden_states)))
        level = self.embed(nn.functional.silu(temb))
        h = h + level.reshape(*level.shape, *[1] * (h.ndim - 2))
        return hidden_states + self.second(nn.functional.silu(self.second_norm(h)))


def _neighbour_sum(x: Tensor) -> Tensor:
    """A x: at every voxel the sum of its next ones along each axis."""
    total = torch.zeros_like(x)
    for dim in range(2, x.ndim):
        size = x.shape[dim]
        none = torch.zeros_like(x.narrow(dim, 0, 1))
        before = torch.cat((none, x.narrow(dim, 0, size - 1)), dim)
        after = torch.cat((x.narrow(dim, 1, size - 1), none), dim)
        total = total + before + after
    return total
