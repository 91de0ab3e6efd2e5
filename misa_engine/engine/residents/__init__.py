"""Residents: matrices that do not train lie on the card in 8 bits, and exact on the host (docs: residents).

    load      exact weight -> host; quantised once -> 8 bits on the card
    forward   8 bits -> workspace (one, of the largest matrix) -> product
    switch    what is drawn is uploaded into the arena's own memory; what leaves is written back to its master, exactly,
              and quantised anew from its bits. So errors never accumulate, and never reach what is saved.

    from misa_engine.engine.residents import rest
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)       # on the CPU
    residents = rest(model, "int8", "cuda")
    optimizer = MISA(model, ...)

Embeddings, head, norms, biases and matrices outside ``nn.Linear`` stay in full on the card; ``residents.describe()``
names them. ``Residents(model, ...)`` with ``hold(name, weight)`` takes the matrices one by one, also into a model on
the meta device, for loaders that stream.

    masters.py   where exact weights lie: pinned memory, or pages of the model's own files
    matrix.py    one matrix and its three forms
    forward.py   the product and its gradient
    staying.py   model.to() and the like
    store.py     all matrices of a model
    options.py   what the optimizer does differently
"""

from misa_engine.engine.residents.masters import open_mapped
from misa_engine.engine.residents.options import for_residents
from misa_engine.engine.residents.store import (
    Residents,
    card_bytes,
    linear_modules,
    residents_of,
    rest,
    resting_names,
)

__all__ = [
    "Residents",
    "card_bytes",
    "for_residents",
    "linear_modules",
    "open_mapped",
    "residents_of",
    "rest",
    "resting_names",
]
