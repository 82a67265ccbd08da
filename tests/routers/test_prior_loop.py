"""The closed loop: routers with a fixed skew are balanced by a prior, and stay so; the published rule beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moegeo_router import ExpertPrior, SignBias, topk_gating
from moegeo_router.metrics import expert_counts, max_violation

TOKENS_PER_EXPERT = 128


def skewed(num_experts: int, kind: str) -> Tensor:
    """What is added to every token's logits."""
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(7))
    experts = torch.arange(num_experts)
    return {
        "linear": torch.linspace(-3, 3, num_experts)[order],
        "one wins": 6.0 * (experts == 1),
        "half are dead": -5.0 * (experts < num_experts // 2)[order],
        "zipf": -2 * torch.log(1.0 + experts)[order],
    }[kind]


def tokens(num_experts: int, k: int, kind: str) -> Tensor:
    noise = torch.randn(TOKENS_PER_EXPERT * num_experts // k, num_experts, generator=torch.Generator().manual_seed(0))
    return skewed(num_experts, kind) + noise


def violations(rule: ExpertPrior | SignBias, z_TE: Tensor, k: int, steps: int, scores: str = "softmax") -> Tensor:
    """Return max_violation before each step."""
    found = []
    for _ in range(steps):
        gating = topk_gating(rule(z_TE), k, scores=scores, renormalize=False, **rule.selection())
        counts = expert_counts(gating.ids, z_TE.shape[-1])
        found.append(max_violation(counts.double()))
        rule.update(counts)
    return torch.stack(found)


@pytest.mark.parametrize("where", ["selection", "logits"])
@pytest.mark.parametrize("kind", ["linear", "one wins", "half are dead", "zipf"])
@pytest.mark.parametrize(("num_experts", "k"), [(8, 1), (8, 2), (64, 1), (64, 2)])
def test_balance_is_reached_and_kept(num_experts, k, kind, where):
    z = tokens(num_experts, k, kind)
    found = violations(ExpertPrior(num_experts, where=where), z, k, 110)
    assert found[0] > 0.9
    assert found[90:].max() < 0.1  # no cycle either


def test_sigmoid_scores_are_balanced_too():
    found = violations(ExpertPrior(8), tokens(8, 2, "linear"), 2, 250, scores="sigmoid")
    assert found[0] > 0.9
    assert found[220:].max() < 0.1


@pytest.mark.parametrize("kind", ["linear", "one wins", "half are dead", "zipf"])
def test_the_sign_rule_needs_more_steps_at_every_speed(kind):
    """Fast enough to arrive, it does not stay; slow enough to stay, it takes hundreds of steps."""
    z = tokens(8, 2, kind)
    ours = violations(ExpertPrior(8), z, 2, 100)
    arrived = int((ours >= 0.1).nonzero()[-1]) + 1
    assert arrived <= 80
    for speed in (1e-4, 1e-3, 1e-2, 1e-1):
        theirs = violations(SignBias(8, speed=speed), z, 2, 100, scores="sigmoid")
        assert theirs[arrived:].max() > 0.1, speed


def test_transport_by_isometry_cycles_where_the_exponential_one_does_not():
    """Experts far below uniform react √(u / π) times as strongly: why it is not the default."""
    z = tokens(8, 1, "one wins")
    assert violations(ExpertPrior(8, transport="isometric", speed=0.1), z, 1, 150)[100:].max() > 0.3
    assert violations(ExpertPrior(8, transport="isometric", speed=0.01), z, 1, 150)[100:].max() < 0.1
    assert violations(ExpertPrior(8, speed=0.1), z, 1, 150)[100:].max() < 0.1


@pytest.mark.parametrize(("spread", "speed"), [(0.15, 0.05), (3.0, 0.3)])
def test_logits_of_other_spreads(spread, speed):
    z = spread * (tokens(64, 2, "linear") - skewed(64, "linear")) + skewed(64, "linear")
    found = violations(ExpertPrior(64, speed=speed), z, 2, 60)
    assert found[40:].max() < 0.1


def test_logits_further_apart_than_the_floor_reaches_stay_unbalanced_and_do_not_run_away():
    z = tokens(8, 1, "one wins") + 20.0 * (torch.arange(8) == 1)
    prior = ExpertPrior(8, floor=1e-3)
    assert violations(prior, z, 1, 300)[-1] == 7
    assert prior.log_prior()[1] == pytest.approx(-6.9078, abs=2e-3)
    torch.testing.assert_close(prior.pi[2:], prior.pi[0].expand(6))


def test_logits_that_hardly_spread_need_a_lower_speed():
    """The known limit of the default: here it overshoots, 0.01 does not."""
    z = 0.05 * tokens(64, 1, "linear")
    assert violations(ExpertPrior(64), z, 1, 40)[20:].max() > 1
    assert violations(ExpertPrior(64, speed=0.01), z, 1, 40)[20:].max() < 0.1
