"""Train an upcycled language model on several ranks with transformers' Trainer.

Needs `pip install 'tnmoe[hf]'`. On two CPUs, or on as many GPUs as you say:

    torchrun --nproc-per-node 2 examples/distributed/trainer.py
"""

import tempfile

import torch
import transformers

from tnmoe import hf


def main() -> None:
    """Train for 30 steps on random rows, and print the loss before and after."""
    cpu = not torch.cuda.is_available()
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    dense = transformers.LlamaForCausalLM(config)
    model = hf.upcycle(dense, hf.MPOEConfig(num_experts=4, layout="residual", max_bond=8))
    rows = torch.randint(64, (32, 16))
    data = [{"input_ids": row, "labels": row} for row in rows]

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2,
            lr_scheduler_type="constant", save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=cpu, dataloader_pin_memory=not cpu,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.remove_callback(transformers.PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"{arguments.world_size} ranks: loss {before:.2f}, after training {after:.2f}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
