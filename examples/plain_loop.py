"""MISA in a loop of your own: python examples/plain_loop.py [--model Qwen/Qwen2.5-0.5B]."""

import torch

from misa_engine import MISA
from tiny import arguments, model_and_tokenizer

options = arguments()
model, tokenizer = model_and_tokenizer(options.model)
text = "Every T steps a few weight matrices are drawn, and only these train. " * 40
ids = torch.tensor(tokenizer(text)["input_ids"], device=model.device)
batches = ids[: len(ids) // 64 * 64].view(-1, 64)

# Build it on the final device and before anything is frozen: it freezes and unfreezes by itself.
optimizer = MISA(model, lr=1e-5 if options.model else 3e-3, delta=0.03 if options.model else 0.2, inner_steps=4)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=options.steps)
optimizer.on_switch(lambda event: print(f"step {event.step}: {', '.join(event.active)}"))

for step in range(options.steps):
    batch = batches[step % len(batches)].unsqueeze(0)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}")

print({name: f"{size / 2**20:.2f} MiB" for name, size in optimizer.memory().items()})
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{options.output_dir}.pt")
