"""MISA in the Hugging Face Trainer, or any class derived from it: python examples/hf_trainer.py [--model ...]."""

from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from misa_engine.trainer import ManifestCallback, MisaFactory
from tiny import arguments, model_and_tokenizer

options = arguments()
model, tokenizer = model_and_tokenizer(options.model)
texts = [f"{a} + {b} = {a + b}" for a in range(8) for b in range(8)]
data = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        options.output_dir,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=4,
        report_to="none",
    ),
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    # The keyword arguments are MisaConfig's fields; nothing is taken from TrainingArguments but the schedule.
    optimizer_cls_and_kwargs=(MisaFactory, {"lr": 1e-5, "delta": 0.03 if options.model else 0.2, "inner_steps": 4}),
    callbacks=[ManifestCallback()],  # lists each checkpoint's files with checksums; see last_good_checkpoint
)
trainer.train()
trainer.save_model()
