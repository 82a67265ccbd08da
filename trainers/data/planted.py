"""Data whose domains are known because we made them: Markov sources and image clusters.

The ground truth a router can be measured against: ``domains`` is the source (cluster) of every token (image),
and ``PlantedText.entropy`` is the loss no model can beat. Shapes: S sources, A symbols, D documents, K
clusters.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from trainers.data.base import generator, held_out, require_integer
from trainers.data.images import ImageData, Images
from trainers.data.text import TokenData, TokenStream

# Keeps every transition possible, so that each source has one stationary distribution.
FLOOR = 1e-6


class PlantedText(TokenData):
    """Documents from S Markov sources over one alphabet; a document's source is its domain.

    Source s moves from symbol a to b with probability P_s(b | a); each row P_s(. | a) is drawn from a
    symmetric Dirichlet distribution. A document begins in the source's stationary distribution π_s. All
    sources use all symbols, so the source shows only in the transitions. Tokens 1 to A are the symbols, token
    0 ends a document. The pooled bigram model of ``baseline`` mixes the sources' rows: a model that finds out
    the source goes below it, down to ``entropy``.

    Args:
        sources: S.
        alphabet: A.
        concentration: of the Dirichlet rows; small for sharp, distinct sources, large for uniform, similar
            ones.
        documents: documents in all, the same number from each source, in random order.
        document_length: tokens of a document, its end included.
        valid_fraction: share of each source's documents held out.
        batch_size: B.
        length: L.
        seed: of the sources, the documents and the windows.
        valid_tokens: limit on the tokens of one validation, spread over all sources; None for the whole
            split.

    Raises:
        ValueError: if an option is out of range.
    """

    planted = True

    def __init__(
        self,
        *,
        sources: int = 4,
        alphabet: int = 32,
        concentration: float = 0.1,
        documents: int = 4000,
        document_length: int = 256,
        valid_fraction: float = 0.05,
        batch_size: int = 32,
        length: int = 256,
        seed: int = 0,
        valid_tokens: int | None = 65536,
    ) -> None:
        require_integer("sources", sources, 1)
        require_integer("alphabet", alphabet, 2)
        require_integer("documents", documents, 2 * sources)
        require_integer("document_length", document_length, 2)
        require_integer("seed", seed, 0)
        require_positive("concentration", concentration)
        self.transitions_SAA = draw_transitions(sources, alphabet, concentration, seed)
        self.stationary_SA = stationary(self.transitions_SAA)
        source = generator(seed, "documents", 0)
        source_D = (torch.arange(documents) % sources)[torch.randperm(documents, generator=source)]
        symbols_DT = self._sample(source_D, document_length - 1, source)
        domains = tuple(f"source{s}" for s in range(sources))
        held = torch.tensor(held_out([(domains[s], str(d)) for d, s in enumerate(source_D.tolist())], valid_fraction))
        by_source = source_D.argsort(stable=True)
        train, valid = (
            TokenStream.of(list(symbols_DT[rows]), source_D[rows].tolist(), end_of_document=0)
            for rows in ((~held).nonzero().squeeze(1), by_source[held[by_source]])
        )
        super().__init__(
            "planted",
            train,
            valid,
            domains=domains,
            vocab_size=alphabet + 1,
            batch_size=batch_size,
            length=length,
            seed=seed,
            valid_tokens=valid_tokens,
        )

    def _sample(self, source_D: Tensor, steps: int, source: torch.Generator) -> Tensor:
        """Draw the symbols 1 to A of documents of the given sources: (D, steps) int32."""
        first_DA, next_SAA = self.stationary_SA.cumsum(-1)[source_D], self.transitions_SAA.cumsum(-1)
        uniform_TD = torch.rand(steps, len(source_D), generator=source, dtype=torch.double)
        last = self.stationary_SA.shape[1] - 1
        symbols, cumulative_DA = [], first_DA
        for uniform_D in uniform_TD:
            # The cumulative sums may end just below 1.
            state_D = (uniform_D[:, None] >= cumulative_DA).sum(-1).clamp(max=last)
            symbols.append(state_D)
            cumulative_DA = next_SAA[source_D, state_D]
        return (torch.stack(symbols, 1) + 1).int()

    def entropy(self) -> float:
        """The mean over sources of the entropy rate h_s = -Σ_a π_s(a) Σ_b P_s(b | a) log P_s(b | a), nats a symbol.

        Returns:
            The loss of the true model that knows the source, on symbols after the first of a document. (Ends
            come at a known place; the first symbol of a document costs its source and its stationary
            entropy.)
        """
        p = self.transitions_SAA
        return float((self.stationary_SA * -(p * p.log()).sum(-1)).sum(-1).mean())


def require_positive(name: str, value: float) -> None:
    """Refuse a number that is not finite and above zero.

    Args:
        name: the argument's name, for the message.
        value: the number.

    Raises:
        ValueError: if it is not.
    """
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def draw_transitions(sources: int, alphabet: int, concentration: float, seed: int) -> Tensor:
    """Transition matrices with symmetric Dirichlet rows.

    Args:
        sources: S.
        alphabet: A.
        concentration: of the Dirichlet distribution.
        seed: of the rows.

    Returns:
        (S, A, A) float64, rows summing to 1, no entry below about ``FLOOR``.
    """
    # torch's Dirichlet takes no generator.
    numbers = np.random.default_rng(generator(seed, "sources", 0).initial_seed())
    rows = torch.from_numpy(numbers.dirichlet([concentration] * alphabet, size=(sources, alphabet))) + FLOOR
    return rows / rows.sum(-1, keepdim=True)


def stationary(transitions_SAA: Tensor) -> Tensor:
    """The stationary distribution of each source: π P = π, Σ π = 1.

    Args:
        transitions_SAA: (S, A, A) positive rows summing to 1.

    Returns:
        (S, A), the unique solution.
    """
    size = transitions_SAA.shape[-1]
    balance = transitions_SAA.mT - torch.eye(size, dtype=transitions_SAA.dtype)
    balance[:, -1] = 1  # one balance equation follows from the others; in its place the normalisation
    right = torch.zeros(len(balance), size, dtype=balance.dtype)
    right[:, -1] = 1
    return torch.linalg.solve(balance, right).clamp(min=0)


class PlantedImages(ImageData):
    """Images of K clusters; the cluster is the domain, and without it the class cannot be told.

    An image of cluster k and class c is background_k + pattern_((c + k) mod classes) + noise: all clusters
    share the patterns, but each assigns them to the classes in its own way. Who ignores the background is
    right in one of K cases (K up to the number of classes). Backgrounds and patterns are drawn from a
    standard normal distribution.

    Args:
        clusters: K.
        classes: number of classes.
        size: height and width of the one-channel images.
        noise: standard deviation of the noise.
        images: images in all, dealt to the clusters and classes in turn.
        valid_fraction: share of each cluster's images held out.
        batch_size: B.
        seed: of the ground truth, the noise and the epochs.
        valid_images: limit on the images of one validation; None for the whole split.

    Raises:
        ValueError: if an option is out of range.
    """

    planted = True

    def __init__(
        self,
        *,
        clusters: int = 4,
        classes: int = 4,
        size: int = 8,
        noise: float = 0.5,
        images: int = 8000,
        valid_fraction: float = 0.1,
        batch_size: int = 64,
        seed: int = 0,
        valid_images: int | None = None,
    ) -> None:
        require_integer("clusters", clusters, 1)
        require_integer("classes", classes, 2)
        require_integer("size", size, 1)
        require_integer("images", images, 2 * clusters * classes)
        require_integer("seed", seed, 0)
        require_positive("noise", noise)
        source = generator(seed, "images", 0)
        self.backgrounds = torch.randn(clusters, 1, size, size, generator=source)
        self.patterns = torch.randn(classes, 1, size, size, generator=source)
        index = torch.arange(images)
        domains, labels = index % clusters, index // clusters % classes
        pixels = self.backgrounds[domains] + self.patterns[(labels + domains) % classes]
        pixels = pixels + noise * torch.randn(pixels.shape, generator=source)
        names = tuple(f"cluster{k}" for k in range(clusters))
        held = torch.tensor(held_out([(names[k], str(i)) for i, k in enumerate(domains.tolist())], valid_fraction))
        train, valid = (
            Images(pixels=pixels[side], classes=labels[side], domains=domains[side]) for side in (~held, held)
        )
        super().__init__(
            "planted_images",
            train,
            valid,
            domains=names,
            num_classes=classes,
            batch_size=batch_size,
            seed=seed,
            valid_images=valid_images,
        )
