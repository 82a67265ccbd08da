"""Evaluation: the held-out loss of a model and the geometry of its routing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.data.base import Batch, Data
from trainers.models.moe import ModelOutput
from trainers.observation import RECOVERY, RoutingRecord, over_layers


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a validation found.

    Attributes:
        loss: mean cross-entropy, nats a target (token or image).
        bits_per_byte: of a language model, else None.
        accuracy: share of targets predicted first.
        domain_loss: mean cross-entropy by domain.
        layers: scalars of each MoE layer (``RoutingRecord.layers``).
        domain_targets: how many targets each domain has.
    """

    loss: float
    bits_per_byte: float | None
    accuracy: float
    domain_loss: dict[str, float]
    layers: dict[str, dict[str, float]]
    domain_targets: dict[str, int] = field(default_factory=dict)

    def scalars(self, per_layer: bool = False) -> dict[str, float]:
        """Return flat keys for the log: ``valid/loss`` …, ``valid/geometry/fsi`` … (``over_layers``).

        Where the domains are planted also ``valid/recovery`` and ``valid/recovery_ami``, means over the layers.
        """
        flat = {"valid/loss": self.loss, "valid/accuracy": self.accuracy}
        if self.bits_per_byte is not None:
            flat["valid/bits_per_byte"] = self.bits_per_byte
        for name in next(iter(self.layers.values()), {}):
            values = [scalars[name] for scalars in self.layers.values()]
            place = "valid" if name in RECOVERY else "valid/geometry"
            flat[f"{place}/{name}"] = over_layers(name, values)
        if per_layer:
            flat |= {f"valid/domain/{domain}/loss": loss for domain, loss in self.domain_loss.items()}
            flat |= {
                f"valid/geometry/{layer}/{name}": value
                for layer, scalars in self.layers.items()
                for name, value in scalars.items()
            }
        return flat


def target_losses(output: ModelOutput, batch: Batch) -> Tensor:
    """Return the cross-entropy of every target in nats, in the shape of ``batch.targets``; fp32 whatever the logits."""
    flat = F.cross_entropy(output.logits.float().flatten(0, -2), batch.targets.flatten(), reduction="none")
    return flat.view(batch.targets.shape)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward: bf16 autocast for ``"bf16"``, nothing for ``"fp32"`` and ``"tf32"``."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode and back, whatever happens."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Data, device: torch.device, precision: str = "fp32", *, routing: bool = True
) -> Evaluation:
    """Evaluate ``model`` on the held-out batches of ``data``.

    Args:
        model: language or vision model of ``trainers.models``; its mode (train or eval) is restored.
        data: where ``valid_batches`` come from.
        device: where the model is.
        precision: ``"fp32"``, ``"tf32"`` or ``"bf16"``.
        routing: whether the routing is measured, too; without, there are no ``layers``.

    Raises:
        ValueError: the held-out split has no targets.
    """
    losses, correct, domains = [], [], []
    record = RoutingRecord()
    with _evaluating(model):
        for cpu_batch in data.valid_batches():
            batch = cpu_batch.to(device)
            with autocast(precision, device):
                output = model(batch.inputs)
            if routing:
                record.add(output.routing, batch)
            losses.append(target_losses(output, batch)[batch.mask].cpu())
            correct.append((output.logits.argmax(dim=-1) == batch.targets)[batch.mask].cpu())
            domains.append(cpu_batch.domains[cpu_batch.mask])
    if not sum(len(part) for part in losses):
        raise ValueError(f"the held-out split of {data.name} has no targets")
    loss_T, domain_T = torch.cat(losses).double(), torch.cat(domains)
    loss = float(loss_T.mean())
    counts = torch.bincount(domain_T, minlength=len(data.domains)).tolist()
    targets = dict(zip(data.domains, counts, strict=False))
    bytes_per_token = getattr(data, "bytes_per_token", None)
    return Evaluation(
        loss=loss,
        bits_per_byte=None if bytes_per_token is None else loss / math.log(2) / bytes_per_token,
        accuracy=float(torch.cat(correct).double().mean()),
        domain_loss={
            name: float(loss_T[domain_T == index].mean()) for index, name in enumerate(data.domains) if targets[name]
        },
        layers=record.layers(len(data.domains), planted=getattr(data, "planted", False)),
        domain_targets=targets,
    )
