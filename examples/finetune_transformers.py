"""Fine-tune a MoE of transformers on a folder of texts with its Trainer, with geometry.

python examples/finetune_transformers.py [TEXTS [MODEL]]     (needs transformers, accelerate; seconds on a CPU)

TEXTS is a folder of .txt files (here: what this Python says about itself), MODEL a folder or a name for
``from_pretrained`` that reads bytes (here: a small one that is made on the spot).
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers

import moegeo_router as mg

LENGTH = 128


def small_model(folder: str) -> str:
    """Save a MoE of eight experts that reads bytes, and return its folder."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def sequences(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Return the bytes of all texts in a folder, cut into sequences."""
    text = b"\n".join(file.read_bytes() for file in sorted(folder.rglob("*.txt")))
    if len(text) < LENGTH:
        raise SystemExit(f"{folder}: no .txt files with at least {LENGTH} bytes")
    ids = torch.frombuffer(bytearray(text[:500_000]), dtype=torch.uint8).long()
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def main(texts: str | None = None, model_name: str | None = None) -> None:
    """Fine-tune, and show that what was saved is a model like any other."""
    transformers.set_seed(0)
    scratch = tempfile.mkdtemp()
    if texts is None:
        texts = scratch
        Path(scratch, "python.txt").write_text(
            "\n".join(m.__doc__ or "" for m in (sys, tempfile, torch.nn.Linear)) * 20
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(model_name or small_model(f"{scratch}/start"))
    arguments = transformers.TrainingArguments(
        output_dir="finetuned",
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=10,
        save_strategy="no",
        report_to="none",  # "wandb": the same numbers are there, too
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=sequences(Path(texts)))
    trainer.add_callback(mg.MoEGeometryCallback(trainer))
    trainer.train()
    for line in trainer.state.log_history:
        if "geometry/fsi" in line:
            print(f"step {line['step']}: loss {line['loss']:.2f}, FSI {line['geometry/fsi']:.3f}", end="")
            print(f", dead experts {line['geometry/dead_fraction']:.0%}")
    trainer.save_model("finetuned")
    print("saved; stock transformers loads it:", type(model).from_pretrained("finetuned").__class__.__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
