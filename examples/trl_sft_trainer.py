"""Learn the prune ratio of a LoRA adapter in `trl.SFTTrainer`, which tokenises the rows.

python examples/trl_sft_trainer.py MODEL TRAIN.jsonl MICRO_DEV.jsonl OUT
Each line of the files is {"prompt": "...", "completion": "..."}.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from grasp_lora import RatioSearch

name, train, micro_dev, out = sys.argv[1:]
rows = load_dataset("json", data_files={"train": train, "micro_dev": micro_dev})
trainer = SFTTrainer(
    name,
    SFTConfig(
        f"{out}/checkpoints",
        num_train_epochs=5,
        learning_rate=2e-4,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["micro_dev"],
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
)
search = RatioSearch(trainer.eval_dataset)  # as the trainer tokenised it
trainer.add_callback(search)
trainer.train()
search.save(f"{out}/final")
print(f"ratio {search.ratio:.2f}, verdict {search.verdict}, saved in {out}/final")
