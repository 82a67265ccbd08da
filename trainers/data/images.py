"""Labelled images: epochs, padding, standardisation, baseline and fingerprint for every vision source.

Shapes: N images of a split, B of a batch, C channels, H by W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trainers.data.base import Baseline, Batch, fingerprint, generator, require_integer


@dataclass(frozen=True, kw_only=True)
class Images:
    """A split of a labelled image set.

    Args:
        pixels: (N, C, H, W), uint8 or float32.
        classes: (N,) int64 what to predict.
        domains: (N,) int64 domain of each image.
    """

    pixels: Tensor
    classes: Tensor
    domains: Tensor

    def __len__(self) -> int:
        return len(self.pixels)


class ImageData:
    """Vision data over two splits; what all image sources share.

    Every epoch is a new permutation of the train images, a function of (seed, epoch); a batch is the next B
    images of the epochs laid end to end. Pixels are standardised: (x - mean) / std with the train split's
    mean and std of each channel.

    Args:
        name: the data set's name.
        train: the train split.
        valid: the held-out split.
        domains: domain names.
        num_classes: number of classes.
        batch_size: B.
        seed: of the permutations.
        valid_images: limit on the images of one validation, drawn once for all runs; None for the whole split.

    Raises:
        ValueError: if an option is out of range or a split is empty.
    """

    task = "vision"

    def __init__(
        self,
        name: str,
        train: Images,
        valid: Images,
        *,
        domains: tuple[str, ...],
        num_classes: int,
        batch_size: int,
        seed: int,
        valid_images: int | None,
    ) -> None:
        self.name, self.domains, self.num_classes = name, domains, num_classes
        self.batch_size = require_integer("batch_size", batch_size, 1)
        self.seed = require_integer("seed", seed, 0)
        if valid_images is not None:
            require_integer("valid_images", valid_images, 1)
        for split, images in (("train", train), ("valid", valid)):
            if not len(images):
                raise ValueError(f"{name}: expected images in the {split} split, got none")
        self._train, self._valid = train, valid
        count = min(len(valid), valid_images or len(valid))
        # Drawn, not evenly spaced: sets whose classes come in turn would show only some of them. The same for every
        # seed, so that runs can be compared.
        self._shown_N = torch.randperm(len(valid), generator=generator(0, "valid", 0))[:count].sort().values
        channels, height, width = train.pixels.shape[1:]
        self.image_shape = (channels, height, width)
        self._mean_C, self._std_C = channel_moments(train.pixels)
        parts = (tensor for split in (train, valid) for tensor in (split.pixels, split.classes, split.domains))
        self.fingerprint = fingerprint([*domains, str(num_classes), *parts])

    @cached_property  # asked for every shifted batch, and the split is large
    def pixel_range(self) -> tuple[float, float]:
        """The least and the largest pixel of the train split."""
        return float(self._train.pixels.min()), float(self._train.pixels.max())

    def standardised(self, pixels: Tensor) -> Tensor:
        """What a model sees of pixels (B, C, H, W).

        Args:
            pixels: as the set has them.

        Returns:
            float32.
        """
        return (pixels.float() - self._mean_C[:, None, None]) / self._std_C[:, None, None]

    def pixels(self, inputs: Tensor) -> Tensor:
        """The inverse of ``standardised``, up to rounding.

        Args:
            inputs: (B, C, H, W) of a batch.

        Returns:
            float32 pixels.
        """
        return inputs * self._std_C[:, None, None] + self._mean_C[:, None, None]

    def _batch(self, images: Images, index_B: Tensor, mask_B: Tensor) -> Batch:
        return Batch(
            inputs=self.standardised(images.pixels[index_B]) * mask_B[:, None, None, None],
            targets=images.classes[index_B] * mask_B,
            mask=mask_B,
            domains=images.domains[index_B] * mask_B,
            documents=index_B * mask_B,
        )

    def train_batch(self, step: int) -> Batch:
        """The training batch of a step, a pure function of (seed, step).

        Args:
            step: the step, from 0.

        Returns:
            B images, nothing masked. Within an epoch every image comes once; a batch may span two epochs.

        Raises:
            ValueError: if the step is negative.
        """
        first, size = require_integer("step", step, 0) * self.batch_size, len(self._train)
        epochs = range(first // size, (first + self.batch_size - 1) // size + 1)
        order = torch.cat([torch.randperm(size, generator=generator(self.seed, "epoch", e)) for e in epochs])
        index_B = order[first % size :][: self.batch_size]
        return self._batch(self._train, index_B, torch.ones(self.batch_size, dtype=torch.bool))

    def valid_batches(self) -> Iterator[Batch]:
        """The held-out batches, in order, the same every time.

        Yields:
            Batches of B images; the missing ones of the last are zeros and masked.
        """
        for index in self._shown_N.split(self.batch_size):
            mask_B = torch.arange(self.batch_size) < len(index)
            padding = torch.zeros(self.batch_size - len(index), dtype=torch.long)
            yield self._batch(self._valid, torch.cat([index, padding]), mask_B)

    def baseline(self) -> Baseline:
        """The class prior: p(c) = (n_c + 1) / (N + classes) of the train split, on the images of ``valid_batches``.

        Returns:
            Its loss in nats an image.
        """
        counts = torch.bincount(self._train.classes, minlength=self.num_classes).double() + 1
        targets = self._valid.classes[self._shown_N]
        return Baseline("class prior", float(-(counts / counts.sum()).log()[targets].mean()))

    def describe(self) -> str:
        """One line: the sizes of the splits and images, classes and domains.

        Returns:
            The line.
        """
        shape = "x".join(map(str, self.image_shape))
        return (
            f"{self.name}: {len(self._train):,} images train, {len(self._shown_N):,} of {len(self._valid):,} valid, "
            f"{shape}; {self.num_classes} classes, {len(self.domains)} domains"
        )


def channel_moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel.

    Args:
        pixels: (N, C, H, W).

    Returns:
        (C,) mean and (C,) std, float32; the std of a constant channel is given as 1.
    """
    # In blocks, and in double precision: the whole of CIFAR-10 as doubles would be 600 MB.
    sums = torch.zeros(2, pixels.shape[1], dtype=torch.double)
    for block in pixels.split(1024):
        x = block.double()
        sums += torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
    mean, square = sums / (pixels.numel() / pixels.shape[1])
    std = (square - mean.square()).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()
