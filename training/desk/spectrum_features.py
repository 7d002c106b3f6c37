"""
A judge without weights: the logarithm of the power spectrum, of the light and of the two colour differences.

    python training/evaluate_dod.py outputs/desk-samples --reference textures:20000:101 --resolution 32 \
        --extractor training/desk/spectrum_features.py:extractor --metrics fid kid

It sees blur, grain, contrast, the size of patterns and how colourful they are, and not what they show.
"""

import torch


# ITU-R BT.601: Y, Cb and Cr of R, G and B.
TO_YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
FLOOR = 1e-6  # of a power: about that of rounding to 8 bits


def extractor(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in uint8 -> the log of the mean power in each ring of frequencies, (B, 3 * (H / 2 + 2))."""
    pixels = torch.einsum("ij,bjhw->bihw", TO_YCBCR.to(images.device), images.float() / 255)
    height, width = pixels.shape[-2:]
    power = torch.fft.fft2(pixels, norm="forward").abs().square()
    rows = torch.fft.fftfreq(height, 1 / height, device=images.device)[:, None]
    columns = torch.fft.fftfreq(width, 1 / width, device=images.device)[None]
    ring = torch.hypot(rows, columns).round().long().clamp(max=height // 2 + 1)  # the last one has the corners
    rings = torch.zeros(height // 2 + 2, height * width, device=images.device)
    rings[ring.flatten(), torch.arange(height * width, device=images.device)] = 1
    means = power.flatten(2) @ (rings / rings.sum(dim=1, keepdim=True)).T
    return (means + FLOOR).log().flatten(1)
