"""Input layer of the AudioSet taggers: batch normalisation per mel band, with SpecAugment in training."""

import torch
from torch import nn


class SpecAugmentedNorm(nn.BatchNorm2d):
    """`bn0` of HTSAT and Cnn14: normalises each mel band and, in training, masks stripes (SpecAugment, 1904.08779).

    As published, a stripe covers at most 64 of 1001 frames or 8 of 64 bands; the width in frames scales with the
    spectrogram.
    """

    time_share = 64 / 1001
    max_bands = 8

    def __init__(self, bands: int, stripes: int):
        super().__init__(bands)
        self.stripes = stripes

    def forward(self, spectrogram: torch.Tensor) -> torch.Tensor:
        """Map [clips, bands, frames, 1] to the same shape."""
        output = super().forward(spectrogram)
        if not self.training or not self.stripes:
            return output
        clips, bands, frames, _ = output.shape
        keep = torch.ones(clips, bands, frames, dtype=torch.bool, device=output.device)
        keep &= self._stripes(clips, frames, round(frames * self.time_share), output.device)[:, None, :]
        keep &= self._stripes(clips, bands, self.max_bands, output.device)[:, :, None]
        return output * keep[..., None]

    def _stripes(self, clips: int, length: int, max_width: int, device: torch.device) -> torch.Tensor:
        """Return a mask [clips, length] that is false in the random stripes of each clip."""
        width = torch.randint(0, max(1, max_width), (clips, self.stripes, 1), device=device)
        start = (torch.rand(clips, self.stripes, 1, device=device) * (length - width)).long()
        position = torch.arange(length, device=device)
        return ~((position >= start) & (position < start + width)).any(dim=1)
