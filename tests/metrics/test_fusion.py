import pytest
import torch

from clinfuse.metrics.fusion import FUSION_METRICS, OF_FUSED, WITH_SOURCES, fusion_metrics


def pictures(*shape):
    """Smooth structures on black."""
    rough = torch.randn(shape).flatten(0, -3)[:, None]
    image = 2 * torch.nn.functional.avg_pool2d(rough, 5, 1, 2).view(shape)
    image[..., :5, :] = -1
    return image.clamp(-1, 1)


def images(*shape):
    mri, ct = pictures(*shape), pictures(*shape)
    return torch.maximum(mri, ct) * 0.9, mri, ct


def test_every_metric_has_one_finite_value_a_case_in_the_order_of_its_name():
    scores = fusion_metrics(*images(2, 1, 48, 45))
    assert tuple(scores) == FUSION_METRICS
    for name, values in scores.items():
        assert values.shape == (2,) and values.isfinite().all(), name


def test_a_case_scores_the_same_alone_as_in_a_batch():
    batch = images(3, 1, 44, 46)
    together = fusion_metrics(*batch)
    for case in range(3):
        alone = fusion_metrics(*(image[case : case + 1] for image in batch))
        for name, values in alone.items():
            torch.testing.assert_close(values[0], together[name][case], msg=name)


def test_a_volume_of_one_slice_scores_as_that_slice():
    batch = images(2, 1, 44, 46)
    volumes = fusion_metrics(*(image[:, :, None] for image in batch))
    for name, values in fusion_metrics(*batch).items():
        torch.testing.assert_close(volumes[name], values, msg=name)


def test_a_slice_repeated_scores_as_it_does_once():
    batch = images(1, 1, 44, 46)
    repeated = fusion_metrics(*(image[:, :, None].expand(-1, -1, 3, -1, -1) for image in batch))
    for name, values in fusion_metrics(*batch).items():
        torch.testing.assert_close(repeated[name], values, msg=name)


@pytest.mark.parametrize("name", WITH_SOURCES)
def test_exchanging_the_sources_changes_nothing(name):
    fused, mri, ct = images(1, 1, 44, 46)
    torch.testing.assert_close(
        WITH_SOURCES[name](fused, mri, ct), WITH_SOURCES[name](fused, ct, mri)
    )


@pytest.mark.parametrize("name", [name for name in WITH_SOURCES if name != "scd"])
def test_a_source_keeps_more_of_both_than_noise_does(name):
    _, mri, ct = images(1, 1, 44, 46)
    noise = torch.rand_like(mri) * 2 - 1
    assert WITH_SOURCES[name](mri, mri, ct) > WITH_SOURCES[name](noise, mri, ct)


def test_more_noise_is_more_of_everything_that_looks_at_the_fused_image_alone():
    fused, *_ = images(1, 1, 44, 46)
    noisy = fused + 0.3 * torch.randn_like(fused)
    for name, metric in OF_FUSED.items():
        assert metric(noisy) > metric(fused), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_of_the_images_decides_nothing_but_their_levels(dtype):
    levels = [(127.5 * (image + 1)).round() // 32 * 32 for image in images(1, 1, 44, 46)]
    exact = [level / 128 - 1 for level in levels]  # of few bits, the same in all precisions
    expected = fusion_metrics(*exact)
    for name, values in fusion_metrics(*(image.to(dtype) for image in exact)).items():
        torch.testing.assert_close(values, expected[name], msg=name)


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    batch = images(2, 1, 48, 45)
    on_gpu = fusion_metrics(*(image.cuda() for image in batch))
    for name, values in fusion_metrics(*batch).items():
        assert on_gpu[name].is_cuda, name
        torch.testing.assert_close(on_gpu[name].cpu(), values, rtol=1e-3, atol=1e-4, msg=name)
