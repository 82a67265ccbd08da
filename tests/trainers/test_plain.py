"""The plain twin computes what the library's model computes, or the race in trainers.speed would be unfair."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from trainers.models import LanguageModel
from trainers.plain import PlainLanguageModel, plain_step

torch.set_num_threads(1)

SIZES = {"dim": 32, "layers": 2, "heads": 2, "num_experts": 5, "top_k": 2, "expert_hidden": 16, "length": 24}


def _twins() -> tuple[LanguageModel, PlainLanguageModel]:
    torch.manual_seed(0)
    ours = LanguageModel(29, functools.partial(nn.Linear, bias=False), **SIZES)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(3)  # far from the flat start, where a wrong block would hardly show
    plain = PlainLanguageModel(29, **SIZES)
    plain.load_state_dict({key.removeprefix("trunk."): value for key, value in ours.state_dict().items()})
    return ours, plain


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 29, (4, 21), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def test_same_weights_give_the_same_loss_and_gradients():
    ours, plain = _twins()
    inputs, targets = _batch()
    our_loss = F.cross_entropy(ours(inputs).logits.flatten(0, 1), targets.flatten())
    plain_loss = F.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(our_loss, plain_loss, rtol=0, atol=1e-5)
    our_loss.backward()
    plain_loss.backward()
    gradients = {name.removeprefix("trunk."): p.grad for name, p in ours.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_plain_step_is_adamw_on_the_cross_entropy():
    ours, plain = _twins()
    inputs, targets = _batch()
    step = plain_step(plain, lr=1e-3, weight_decay=0.1)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(4):
        loss = F.cross_entropy(ours(inputs).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(step(inputs, targets), loss.detach(), rtol=1e-4, atol=1e-4)


def test_size_is_the_same():
    ours, plain = _twins()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in plain.parameters())
