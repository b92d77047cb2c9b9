import pytest
import torch
from monai.networks.nets.resnet import resnet34, resnet50
from torch import nn

from clinfuse.networks.resnet_encoder import GREY_MEAN, GREY_STD, ResNetEncoder, _max_pool

SMALL = {"layers": [1, 2, 1, 1], "width": 4}


def encoder(spatial_dims=2, in_channels=1, block="basic", **arguments):
    return ResNetEncoder(spatial_dims, in_channels, block, **(SMALL | arguments))


def torchvision_weights(spatial_dims=2, in_channels=3, block="basic", classes=5, **arguments):
    """Random weights by the names of torchvision's ResNets, statistics of batch norms included."""
    resnet = encoder(spatial_dims, in_channels, block, **arguments).resnet
    weights = {name: torch.rand_like(w.float()) for name, w in resnet.state_dict().items()}
    features = resnet.layer4[-1].bn2.num_features * (1 if block == "basic" else 4)
    return weights | {
        "fc.weight": torch.rand(classes, features),
        "fc.bias": torch.rand(classes),
    }


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("shape", [(32, 64), (33, 7), (1, 1), (9, 34, 1), (16, 32, 32)], ids=str)
def test_features_halve_five_times_and_odd_sizes_are_rounded_up(block, shape):
    network = encoder(len(shape), block=block)
    features = network(torch.rand(2, 1, *shape))
    halves = [tuple(-(-n // 2**level) for n in shape) for level in range(1, 6)]
    assert [tuple(f.shape[2:]) for f in features] == halves
    assert tuple(f.shape[1] for f in features) == network.channels


@pytest.mark.parametrize(
    ("block", "theirs"), [("basic", resnet34), ("bottleneck", resnet50)], ids=["34", "50"]
)
def test_it_is_the_published_network_of_its_size(block, theirs):
    ours = ResNetEncoder(2, 3, block).resnet.state_dict()
    settings = {"spatial_dims": 2, "n_input_channels": 3, "shortcut_type": "B"}
    published = theirs(**settings, bias_downsample=False)
    shapes = {name: w.shape for name, w in published.state_dict().items() if name[:3] != "fc."}
    assert {name: w.shape for name, w in ours.items()} == shapes


def test_its_features_are_those_of_monai_s_forward(tmp_path):
    torch.save(torchvision_weights(3, 1), tmp_path / "weights.pth")
    network = encoder(3)
    network.load(tmp_path / "weights.pth")
    network.gain = 1.0
    image = torch.rand(1, 1, 16, 32, 32, dtype=torch.float64)
    network.double()
    last = network(image)[-1]
    scored = (image - image.mean()) / image.std(correction=0)
    torch.testing.assert_close(last.mean((2, 3, 4)), network.resnet(scored))


def test_a_stem_in_colour_is_averaged_and_answers_to_grey_as_it_did_to_three_equal_channels(
    tmp_path,
):
    weights = torchvision_weights()
    torch.save(weights, tmp_path / "weights.pth")
    grey, colour = encoder(in_channels=1), encoder(in_channels=3)
    for network in (grey, colour):
        network.load(tmp_path / "weights.pth")
    torch.testing.assert_close(
        grey.resnet.conv1.weight, weights["conv1.weight"].mean(1, keepdim=True)
    )
    assert torch.equal(colour.resnet.conv1.weight, weights["conv1.weight"])
    image = 2 * torch.rand(1, 1, 24, 24) - 1
    photograph = ((image + 1) / 2 - GREY_MEAN) / GREY_STD
    expected = nn.functional.conv2d(
        photograph.expand(-1, 3, -1, -1), weights["conv1.weight"], stride=2, padding=3
    )
    for network, channels in ((grey, 1), (colour, 3)):
        stem = network.resnet.conv1(network._normalised(image.expand(-1, channels, -1, -1)))
        torch.testing.assert_close(stem, expected, rtol=1e-4, atol=1e-4)


def test_a_grey_stem_of_volumes_is_repeated_for_three_channels(tmp_path):
    weights = torchvision_weights(3, 1)
    torch.save({"state_dict": {f"module.{n}": w for n, w in weights.items()}}, tmp_path / "w.pth")
    one, three = encoder(3, 1), encoder(3, 3)
    for network in (one, three):
        network.load(tmp_path / "w.pth")
        network.double()
    image = torch.rand(2, 1, 6, 12, 12, dtype=torch.float64)
    same = image.expand(-1, 3, -1, -1, -1)
    for ours, theirs in zip(one(image), three(same), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_volume_is_z_scored_over_what_is_not_black(tmp_path):
    volume = torch.full((2, 1, 4, 6, 8), -1.0)
    volume[:, :, 1:3] = 0.3 * torch.rand(2, 1, 2, 6, 8)
    scored = encoder(3)._normalised(volume)[:, :, 1:3].flatten(1)
    torch.testing.assert_close(scored.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.std(1, correction=0), torch.ones(2))
    assert encoder(3)._normalised(torch.full((1, 1, 2, 2, 2), -1.0)).isfinite().all()


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"layers": [1, 1, 1, 1]}, r"no layer2\.1\.conv1\.weight, .* and 7 more: "),
        ({"layers": [1, 2, 2, 1]}, r"too many: layer3\.1\.conv1\.weight, .* and \d+ more: "),
        ({"width": 8}, r"shapes: conv1\.weight \(8, 3, 7, 7\) for \(4, 1, 7, 7\), .* and \d+ more"),
        ({"block": "bottleneck"}, r"no layer2\.0\.downsample|too many: layer1\.0\.conv3\.weight"),
        ({"spatial_dims": 3}, r"shapes: conv1\.weight \(4, 3, 7, 7, 7\) for \(4, 1, 7, 7\)"),
        ({"shortcut": "padding"}, r"no layer2\.0\.downsample\.0\.weight, .* and \d+ more: "),
    ],
    ids=["shallower", "deeper", "wider", "bottleneck", "volumes", "padding"],
)
def test_weights_of_another_resnet_are_refused_in_a_sentence_that_says_where(
    theirs, said, tmp_path
):
    torch.save(torchvision_weights(**theirs), tmp_path / "weights.pth")
    ours = r"expected weights of a 2-D ResNet of basic blocks \[1, 2, 1, 1\], width 4 and shortcuts"
    with pytest.raises(ValueError, match=f"{ours} by convolution, got .*({said}).*weights.pth"):
        encoder().load(tmp_path / "weights.pth")


@pytest.mark.parametrize("dims", [2, 3])
def test_slices_for_a_network_of_volumes_and_volumes_for_one_of_slices_are_refused(dims):
    with pytest.raises(
        ValueError, match=rf"images of {dims} axes \(spatial_dims\), got {5 - dims}"
    ):
        encoder(dims)(torch.zeros(1, 1, *[16] * (5 - dims)))


def test_shortcuts_by_padding_have_no_weights_and_keep_the_gradient():
    network = encoder(3, shortcut="padding")
    assert not any("downsample" in name for name in network.state_dict())
    shortcut = network.resnet.layer2[0].downsample
    image = torch.rand(1, 4, 5, 6, 7, requires_grad=True)
    out = shortcut(image)
    assert torch.equal(out[:, :4], image[:, :, ::2, ::2, ::2]) and (out[:, 4:] == 0).all()
    (slope,) = torch.autograd.grad(out.sum(), image)
    assert slope.sum() == out[:, :4].numel()


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_random_activations_keep_their_size_through_all_of_a_deep_network(block):
    network = ResNetEncoder(2, 1, block, [3, 4, 6, 3], width=32)
    with torch.no_grad():
        sizes = [f.square().mean().sqrt() for f in network(2 * torch.rand(2, 1, 64, 64) - 1)]
    assert min(sizes) / max(sizes) > 0.1


def test_batch_norms_keep_their_statistics_in_training():
    network = encoder().train()
    before = {name: t.clone() for name, t in network.named_buffers()}
    network(torch.rand(2, 1, 32, 32))
    assert all(torch.equal(before[name], t) for name, t in network.named_buffers())
    whole = nn.ModuleList([network]).train()
    assert not whole[0].resnet.bn1.training and whole[0].resnet.layer1.training


@pytest.mark.parametrize("shape", [(7, 8), (5, 6, 7), (1, 4, 3)], ids=str)
def test_pooling_in_two_steps_is_max_pooling(shape):
    image = torch.rand(2, 3, *shape)
    whole = {2: nn.functional.max_pool2d, 3: nn.functional.max_pool3d}[len(shape)]
    assert torch.equal(_max_pool(image), whole(image, 3, 2, 1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"spatial_dims": 4}, "expected spatial_dims 2 or 3, got 4"),
        ({"layers": [1, 1, 1]}, "expected blocks for each of four stages"),
    ],
)
def test_a_network_that_is_no_resnet_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        encoder(**arguments)
