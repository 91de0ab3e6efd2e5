"""Accelerate with accumulation, updating inside the backward pass: python examples/accelerate_accumulation.py."""

import torch
from accelerate import Accelerator

from misa_engine import MISA
from tiny import arguments, model_and_tokenizer

options = arguments()
accelerator = Accelerator(gradient_accumulation_steps=4)
model, tokenizer = model_and_tokenizer(options.model)
ids = torch.tensor(tokenizer("Only the drawn matrices hold gradients. " * 60)["input_ids"])
loader = torch.utils.data.DataLoader(ids[: len(ids) // 32 * 32].view(-1, 32), batch_size=2)

# update_in="backward" holds no gradient at all after the last pass; it cannot clip by the global norm.
delta = 0.03 if options.model else 0.2
optimizer = MISA(model, lr=1e-5, delta=delta, inner_steps=2, update_in="backward")
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
misa = optimizer.optimizer  # out of accelerate's wrapper

while misa.total_steps < options.steps:
    for batch in loader:
        with accelerator.accumulate(model):
            misa.last_micro_batch = accelerator.sync_gradients  # say which pass is the last of its step
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            print(f"step {misa.total_steps}: loss {loss.item():.4f}, round {misa.round}")
