"""Loss of a model whose layers' matrices count as their 8 bits, beside that of its exact weights. On a CPU.

python -m misa_engine.bench.zero_shot MODEL_DIRECTORY zero_shot.json
"""

import hashlib
import json
import pydoc_data.topics
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from misa_engine.engine.residents import linear_modules
from misa_engine.kernels.resident8 import FORMATS, Packed, dequantise, quantise

#: As the check before training: 8 samples of 128 tokens; four such batches, from four places of the text.
SAMPLES, TOKENS, BATCHES = 8, 128, 4


@torch.no_grad()
def main(path: str, target: str) -> None:
    """Measure the formats and write the losses of the batches."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(AutoTokenizer.from_pretrained(path)(text)["input_ids"])
    offsets = [2 * index * (len(ids) // (2 * BATCHES)) for index in range(BATCHES)]
    batches = [ids[first : first + SAMPLES * TOKENS].view(SAMPLES, TOKENS) for first in offsets]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    exact = {name: model.get_parameter(name).clone() for name in linear_modules(model)[0]}
    digest = hashlib.sha256(text.encode()).hexdigest()
    found = {"text_sha256": digest, "tokens": len(ids), "python": sys.version.split()[0], "offsets": offsets}
    for kind in ("exact", *FORMATS):
        for name, weight in exact.items() if kind != "exact" else ():
            packed = Packed.allocate(FORMATS[kind], tuple(weight.shape), "cpu")
            quantise(weight, packed, backend="reference")
            dequantise(packed, model.get_parameter(name).data, backend="reference")
        found[kind] = [float(model(input_ids=batch, labels=batch).loss) for batch in batches]
        print(kind, found[kind], flush=True)
    Path(target).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
