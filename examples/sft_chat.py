"""Supervised fine-tuning on chat records, with metrics, run log and safe checkpoints: python examples/sft_chat.py."""

from datasets import Dataset
from trl import SFTConfig

from misa_engine import MisaTrainer
from tiny import arguments, model_and_tokenizer

options = arguments()
model, tokenizer = model_and_tokenizer(options.model)
records = [
    {
        "messages": [
            {"role": "user", "content": f"What is {a} times {b}?"},
            {"role": "assistant", "content": f"{a} times {b} is {a * b}."},
        ]
    }
    for a in range(6)
    for b in range(6)
]

trainer = MisaTrainer(
    model=model,
    args=SFTConfig(
        options.output_dir,
        learning_rate=1e-5,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        max_length=128,
        logging_steps=1,
        save_steps=4,
        bf16=False,  # autocast; a bf16 model needs none
        report_to="none",
    ),
    train_dataset=Dataset.from_list(records),
    processing_class=tokenizer,
    misa={"delta": 0.03 if options.model else 0.2, "inner_steps": 4},
)
trainer.train()  # trainer.train(resume_from_checkpoint=True) goes on from the last complete checkpoint
trainer.save_model()
