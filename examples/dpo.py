"""Preference optimisation: MisaMixin before TRL's DPOTrainer: python examples/dpo.py [--model ...]."""

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from misa_engine.trainer import MisaMixin
from tiny import arguments, model_and_tokenizer


class MisaDPOTrainer(MisaMixin, DPOTrainer):
    """DPO with MISA as its optimizer, its run log and its checkpoints."""


options = arguments()
model, tokenizer = model_and_tokenizer(options.model)
reference, _ = model_and_tokenizer(options.model)
pairs = [
    {"prompt": f"{a} + {b} = ", "chosen": str(a + b), "rejected": str(a + b + 1)} for a in range(6) for b in range(6)
]

trainer = MisaDPOTrainer(
    model,
    ref_model=reference,
    args=DPOConfig(
        options.output_dir,
        learning_rate=1e-6,
        max_steps=options.steps,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        report_to="none",
    ),
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
    misa={"delta": 0.03 if options.model else 0.2, "inner_steps": 4},
)
trainer.train()
