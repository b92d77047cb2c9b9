import torch

from clinfuse.functional.regional import regional_mean


def test_the_mean_is_over_the_mask_whatever_lies_outside():
    values = torch.tensor([[[1.0, 3.0, float("nan")]]])
    mask = torch.tensor([[[True, True, False]]])
    assert regional_mean(values, mask).item() == 2.0


def test_an_empty_mask_has_no_mean_and_no_gradient():
    values = torch.ones(1, 1, 3, requires_grad=True)
    mean = regional_mean(values, torch.zeros(1, 1, 3, dtype=torch.bool))
    mean.nansum().backward()
    assert mean.isnan().all() and (values.grad == 0).all()
