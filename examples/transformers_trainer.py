"""Learn the prune ratio of a LoRA adapter in a plain `transformers.Trainer`.

python examples/transformers_trainer.py MODEL TRAIN.jsonl MICRO_DEV.jsonl OUT
Each line of the files is {"prompt": "...", "completion": "..."}.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers import DataCollatorForSeq2Seq as Collator

from grasp_lora import RatioSearch

name, train, micro_dev, out = sys.argv[1:]
set_seed(42)  # a new adapter is drawn at random
tokenizer = AutoTokenizer.from_pretrained(name)
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(name),
    LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)


def tokenise(row):
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    answer += [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


files = {"train": train, "micro_dev": micro_dev}
rows = load_dataset("json", data_files=files).map(tokenise, remove_columns=["prompt", "completion"])
search = RatioSearch(rows["micro_dev"])
args = TrainingArguments(f"{out}/checkpoints", num_train_epochs=5, learning_rate=2e-4)
Trainer(model, args, Collator(tokenizer), rows["train"], callbacks=[search]).train()
search.save(f"{out}/final")
print(f"ratio {search.ratio:.2f}, verdict {search.verdict}, saved in {out}/final")
