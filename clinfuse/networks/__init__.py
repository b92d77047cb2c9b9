"""Networks with weights: the conditional U-Net, the rigid registration, the lesion head."""
