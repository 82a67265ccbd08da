"""``fsi_domain``, its bound and its null: content specialization."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moegeo_router.metrics import (
    domain_sums,
    fsi_domain,
    fsi_domain_from_sums,
    fsi_domain_max,
    fsi_domain_null,
)


def naive(p, domains, num_domains):
    """Σ_d w_d 2 arccos Σ_e √(p̄_d p̄), with Python loops."""
    p, domains = p.reshape(-1, p.shape[-1]).tolist(), domains.flatten().tolist()
    experts = range(len(p[0]))
    mean = [sum(row[e] for row in p) / len(p) for e in experts]
    total = 0.0
    for d in range(num_domains):
        rows = [row for row, label in zip(p, domains, strict=True) if label == d]
        if rows:
            of_domain = [sum(row[e] for row in rows) / len(rows) for e in experts]
            overlap = sum(math.sqrt(of_domain[e] * mean[e]) for e in experts)
            total += len(rows) / len(p) * 2 * math.acos(min(overlap, 1.0))
    return total


@pytest.mark.parametrize("shape", [(60,), (5, 12)])
@pytest.mark.parametrize("num_domains", [1, 3, 5])
def test_against_the_naive_reference(shape, num_domains):
    p = (2 * torch.randn(*shape, 6, dtype=torch.float64)).softmax(-1)
    domains = torch.randint(min(num_domains, 4), shape)  # of five domains one is empty
    value = fsi_domain(p, domains, num_domains)
    assert value.shape == ()
    assert value.item() == pytest.approx(naive(p, domains, num_domains), abs=1e-7)
    assert fsi_domain(p.float(), domains, num_domains).item() == pytest.approx(value.item(), abs=1e-5)
    assert fsi_domain(p, domains).item() == pytest.approx(value.item(), abs=1e-12)


def test_by_hand():
    """Domain 0 is (1, 0), domain 1 (1/4, 3/4), 3 tokens to 1: p̄ = (13/16, 3/16)."""
    p = torch.tensor([[1.0, 0.0]] * 3 + [[0.25, 0.75]], dtype=torch.float64)
    first = 2 * math.acos(math.sqrt(13 / 16))
    second = 2 * math.acos(math.sqrt(13 / 64) + math.sqrt(9 / 64))
    value = fsi_domain(p, torch.tensor([0, 0, 0, 1]))
    assert value.item() == pytest.approx(0.75 * first + 0.25 * second, abs=1e-12)


@pytest.mark.parametrize("tokens", [[6, 6], [1, 2, 5], [4, 4, 4, 4], [7]])
def test_disjoint_domains_reach_the_bound(tokens):
    """Every domain spreads over two experts of its own: the overlap with the mean is √w_d."""
    labels = torch.cat([torch.full((n,), d) for d, n in enumerate(tokens)])
    p = torch.eye(len(tokens), dtype=torch.float64).repeat_interleave(2, dim=1)[labels] / 2
    counts = torch.tensor(tokens)
    bound = sum(n / sum(tokens) * 2 * math.acos(math.sqrt(n / sum(tokens))) for n in tokens)
    assert fsi_domain_max(counts.double()).item() == pytest.approx(bound, abs=1e-12)
    assert fsi_domain_max(counts).item() == pytest.approx(bound, abs=1e-6)
    assert fsi_domain(p, labels).item() == pytest.approx(bound, abs=1e-12)
    mixed = 0.9 * p + 0.1 / p.shape[-1]
    assert len(tokens) == 1 or fsi_domain(mixed, labels) < bound
    together = torch.full_like(p, 1 / p.shape[-1])
    assert fsi_domain(together, labels).item() == 0


def test_bound_holds_and_batches():
    p = (5 * torch.randn(200, 8, dtype=torch.float64)).softmax(-1)
    for num_domains in (2, 3, 7):
        domains = torch.randint(num_domains, (200,))
        sums, tokens = domain_sums(p, domains, num_domains)
        assert fsi_domain_from_sums(sums, tokens) <= fsi_domain_max(tokens)
    both = fsi_domain_from_sums(torch.stack([sums, sums.flip(-1) + 1e-3]), torch.stack([tokens, tokens]))
    assert both.shape == (2,)
    assert both[0].item() == pytest.approx(fsi_domain(p, domains).item(), abs=1e-12)
    bounds = fsi_domain_max(torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    assert bounds.tolist() == pytest.approx([math.pi / 2, 0], abs=1e-12)


def test_sums_of_parts():
    p, domains = torch.rand(30, 4, dtype=torch.float64).softmax(-1), torch.randint(3, (30,))
    sums, tokens = domain_sums(p, domains, 3)
    for d in range(3):
        torch.testing.assert_close(sums[d], p[domains == d].sum(0))
        assert tokens[d].item() == (domains == d).sum().item()
    parts = [domain_sums(p[i : i + 10], domains[i : i + 10], 3) for i in (0, 10, 20)]
    added = [sum(part[i] for part in parts) for i in (0, 1)]
    torch.testing.assert_close(added, [sums, tokens])
    # Any common factor will do: averages over steps or ranks are as good as sums.
    whole = fsi_domain(p, domains, 3).item()
    for factor in (1 / 30, 1e-6, 8.0):
        assert fsi_domain_from_sums(factor * sums, factor * tokens).item() == pytest.approx(whole, abs=1e-12)


def test_an_empty_domain_changes_nothing_and_has_finite_gradients():
    p = torch.rand(12, 4, dtype=torch.float64).softmax(-1).requires_grad_()
    domains = torch.tensor([0, 2] * 6)
    sparse = fsi_domain(p, domains, 4)
    dense = fsi_domain(p, domains // 2)
    assert sparse.item() == pytest.approx(dense.item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(sparse, p)
    (expected,) = torch.autograd.grad(dense, p)
    torch.testing.assert_close(gradient, expected)


def test_gradients():
    logits, domains = torch.randn(8, 4, dtype=torch.float64).requires_grad_(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    assert torch.autograd.gradcheck(lambda z: fsi_domain(z.softmax(-1), domains, 4), (logits,), atol=1e-7)
    for hard in (torch.zeros(8, 4), 1e4 * torch.eye(4).repeat(2, 1), torch.tensor([[0.0, -90.0, -101.0, -1e3]] * 8)):
        z = hard.clone().requires_grad_()
        fsi_domain(z.softmax(-1), domains).backward()
        assert z.grad.isfinite().all()


def documents(specialized, num_documents=40, length=50, experts=8, seed=0):
    """Tokens of documents with a routing of their own, and of their domain too if ``specialized``."""
    generator = torch.Generator().manual_seed(seed)
    domains = torch.arange(num_documents) % 4
    own = 1.5 * torch.randn(num_documents, 1, experts, generator=generator, dtype=torch.float64)
    topic = 2.0 * torch.randn(4, experts, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(num_documents, length, experts, generator=generator, dtype=torch.float64)
    logits = own + noise + (topic[domains][:, None] if specialized else 0)
    return logits.softmax(-1), domains


def null_of(p, domains, permutations=200):
    num_documents, length, _ = p.shape
    labels = torch.arange(num_documents)[:, None].expand(-1, length)
    sums, tokens = domain_sums(p, labels, num_documents)
    generator = torch.Generator().manual_seed(1)
    return fsi_domain_null(sums, tokens, domains, 4, permutations=permutations, generator=generator)


def test_the_null_tells_structure_from_none():
    for seed in range(3):
        p, domains = documents(specialized=False, seed=seed)
        null = null_of(p, domains)
        assert null.shape == (200,)
        value = fsi_domain(p, domains[:, None].expand(-1, 50))
        assert null.quantile(0.005) < value < null.quantile(0.995)
        p, domains = documents(specialized=True, seed=seed)
        assert fsi_domain(p, domains[:, None].expand(-1, 50)) > 1.2 * null_of(p, domains).max()


def test_shuffling_tokens_would_make_the_null_far_too_small():
    """Independent of the domain, yet outside the null by token: documents are alike inside."""
    p, domains = documents(specialized=False)
    by_document = null_of(p, domains)
    labels = domains[:, None].expand(-1, 50).flatten()
    generator = torch.Generator().manual_seed(2)
    flat = p.flatten(0, 1)
    by_token = fsi_domain_null(flat, torch.ones(len(flat)), labels, 4, permutations=50, generator=generator)
    value = fsi_domain(flat, labels)
    assert value > 2 * by_token.max()
    assert by_document.mean() > 3 * by_token.mean()
    # About √length apart.
    assert by_document.mean().item() / by_token.mean().item() == pytest.approx(math.sqrt(50), rel=0.35)


def test_each_permutation_relabels_whole_documents():
    """Two documents of one domain each: both labellings give the very value, whatever the lengths."""
    sums = torch.tensor([[9.0, 1.0], [0.5, 1.5]], dtype=torch.float64)
    tokens = torch.tensor([10.0, 2.0], dtype=torch.float64)
    value = fsi_domain_from_sums(sums, tokens).item()
    null = fsi_domain_null(sums, tokens, torch.tensor([1, 0]), 2, permutations=9)
    assert null.tolist() == pytest.approx([value] * 9, abs=1e-12)
    # Three documents in domains (0, 0, 1): the null takes exactly the three values of who is alone.
    sums = torch.tensor([[4.0, 0.0], [3.0, 3.0], [0.0, 2.0]], dtype=torch.float64)
    tokens = sums.sum(-1)
    alone = []
    for i in range(3):
        rest = [j for j in range(3) if j != i]
        stacked = torch.stack([sums[i], sums[rest].sum(0)]), torch.stack([tokens[i], tokens[rest].sum()])
        alone.append(fsi_domain_from_sums(*stacked).item())
    null = fsi_domain_null(sums, tokens, torch.tensor([0, 0, 1]), 2, permutations=60)
    assert np.unique(null.numpy().round(10)) == pytest.approx(sorted(alone), abs=1e-9)


def test_the_generator_decides():
    p, domains = documents(specialized=False)
    assert torch.equal(null_of(p, domains, 5), null_of(p, domains, 5))


def test_bad_input():
    p, domains = torch.rand(6, 4).softmax(-1), torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(ValueError, match=r"domains must be \(6,\), got \(5,\)"):
        fsi_domain(p, domains[:5])
    with pytest.raises(ValueError, match=r"domains must be in 0\.\.1, got 0\.\.2"):
        fsi_domain(p, domains, 2)
    with pytest.raises(ValueError, match=r"domains must be in 0\.\.2, got -1\.\.2"):
        fsi_domain(p, torch.tensor([-1, 1, 2, 0, 1, 2]))
    with pytest.raises(ValueError, match="domains must be integers, got torch"):
        fsi_domain(p, domains.float(), 3)
    with pytest.raises(ValueError, match="p must hold distributions"):
        fsi_domain(torch.randn(6, 4), domains)
    with pytest.raises(ValueError, match="at least one token"):
        fsi_domain(torch.zeros(0, 4), domains[:0])
    with pytest.raises(ValueError, match=r"tokens must be \(3,\), got \(2,\)"):
        fsi_domain_from_sums(torch.ones(3, 4), torch.ones(2))
    with pytest.raises(
        ValueError, match=r"sums must be \(N, E\), tokens and domains \(N,\), got \(6, 4\), \(6,\) and \(5,\)"
    ):
        fsi_domain_null(p, torch.ones(6), domains[:5], 3)
    with pytest.raises(ValueError, match="permutations must be at least 1, got 0"):
        fsi_domain_null(p, torch.ones(6), domains, 3, permutations=0)
