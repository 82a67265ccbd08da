"""Watch the routing of a transformers MoE while your own loop trains it; the training stays the same, bit for bit.

python examples/watch_transformers.py     (needs transformers; seconds on a CPU)
"""

import torch
import transformers

import moegeo_router as mg

CONFIG = transformers.Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    pad_token_id=0,
)


def train(watch: bool) -> tuple[list[float], dict[str, float]]:
    """Train a small model on sequences that count in steps of their own; return its losses and the last metrics."""
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(CONFIG).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    geometry = mg.attach(model) if watch else None  # without an optimizer it only watches
    losses, metrics = [], {}
    for _ in range(30):
        start, stride = torch.randint(64, (8, 1)), torch.randint(1, 5, (8, 1))
        ids = (start + stride * torch.arange(32)) % 64
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if geometry is not None:
            metrics = geometry.metrics()  # once a step; flat: wandb.log(metrics) takes it as it is
    if geometry is not None:
        geometry.detach()
    return losses, metrics


def main() -> None:
    """Train twice, watched and alone."""
    losses, metrics = train(watch=True)
    alone, _ = train(watch=False)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    for name in ("fsi", "fsi_load", "dispersion_1", "fhs", "dead_fraction"):
        print(f"  {name:<14} {metrics[f'geometry/{name}']:.3f}")
    print("the same training as without watching:", losses == alone)


if __name__ == "__main__":
    main()
