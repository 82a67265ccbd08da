"""Images as the training did not show them: noise, blur, less contrast, a rotation.

Shapes: B images, C channels, H by W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.data.base import Baseline, Batch, fingerprint, generator
from trainers.data.images import ImageData

Shift = Callable[[Tensor, float, Tensor, tuple[float, float]], Tensor]
"""(pixels (B, C, H, W), strength, number of each image (B,), range of the pixels) -> pixels"""


def noise(pixels: Tensor, strength: float, number_B: Tensor, limits: tuple[float, float]) -> Tensor:
    """Add Gaussian noise of ``strength`` times the range, and cut at the range; an image always gets the same noise."""
    low, high = limits
    draws = [torch.randn(pixels.shape[1:], generator=generator(0, "noise", n)) for n in number_B.tolist()]
    return (pixels + strength * (high - low) * torch.stack(draws)).clamp(low, high)


def blur(pixels: Tensor, strength: float, number_B: Tensor, limits: tuple[float, float]) -> Tensor:
    """Convolve with a Gaussian of standard deviation ``strength`` pixels, cut at three; the border's pixels go on."""
    radius = math.ceil(3 * strength)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float)
    kernel = torch.exp(-0.5 * (offsets / strength).square())
    kernel = (kernel / kernel.sum()).expand(pixels.shape[1], 1, 1, -1)
    padded = F.pad(pixels, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, groups=len(kernel))
    return F.conv2d(rows, kernel.mT, groups=len(kernel))


def contrast(pixels: Tensor, strength: float, number_B: Tensor, limits: tuple[float, float]) -> Tensor:
    """Scale the distance from the mean of the image, in each channel, by ``strength``; cut at the range."""
    mean = pixels.mean((-2, -1), keepdim=True)
    return (mean + strength * (pixels - mean)).clamp(*limits)


def rotation(pixels: Tensor, strength: float, number_B: Tensor, limits: tuple[float, float]) -> Tensor:
    """Turn by ``strength`` degrees counterclockwise about the centre, bilinearly; the border's pixels go on outside."""
    height, width = pixels.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    cos, sin = math.cos(math.radians(strength)), math.sin(math.radians(strength))
    from_x, from_y = cos * x - sin * y, sin * x + cos * y
    grid = torch.stack([from_x / max(1, width - 1), from_y / max(1, height - 1)], dim=-1) * 2
    grid = grid.expand(len(pixels), -1, -1, -1)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=True)


SHIFTS: dict[str, Shift] = {f.__name__: f for f in (noise, blur, contrast, rotation)}


class Shifted:
    """The held-out images of a data set, shifted: the same images, classes and batches, to evaluate on only.

    Pixels are shifted as they are and standardised afterwards with the moments of the train split, as in training. The
    range of the pixels is that of the train split.

    Args:
        data: the data set.
        kind: one of ``SHIFTS``.
        strength: how much, above 0; in what unit the function of that name says.

    Raises:
        ValueError: data that are no images, an unknown kind, or a strength that is not above 0.
    """

    task = "vision"

    def __init__(self, data: ImageData, kind: str, strength: float) -> None:
        if not isinstance(data, ImageData):
            raise ValueError(f"{kind} shifts images, and {data.name} has none")
        if kind not in SHIFTS:
            raise ValueError(f"kind: expected one of {', '.join(SHIFTS)}, got {kind!r}")
        if not (strength > 0 and math.isfinite(strength)):
            raise ValueError(f"strength: expected a finite number > 0, got {strength!r}")
        self._data, self._kind, self._strength = data, kind, strength
        self.name = f"{data.name} with {kind} {strength:g}"
        self.domains, self.num_classes, self.image_shape = data.domains, data.num_classes, data.image_shape
        self.batch_size = data.batch_size
        self.fingerprint = fingerprint([data.fingerprint, kind, repr(strength)])

    def train_batch(self, step: int) -> Batch:
        """There is no train split.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.name} is to evaluate on only")

    def valid_batches(self) -> Iterator[Batch]:
        """The held-out batches of the data, their images shifted.

        Yields:
            Batches like those of the data.
        """
        shift = SHIFTS[self._kind]
        for batch in self._data.valid_batches():
            pixels = self._data.pixels(batch.inputs)
            shifted = shift(pixels, float(self._strength), batch.documents, self._data.pixel_range)
            yield replace(batch, inputs=self._data.standardised(shifted) * batch.mask[:, None, None, None])

    def baseline(self) -> Baseline:
        """That of the data: the class prior sees no pixel."""
        return self._data.baseline()

    def describe(self) -> str:
        """One line: what is shifted and how."""
        return f"{self.name}: {self._data.describe()}"
