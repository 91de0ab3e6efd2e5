"""The lean forward: when it is chosen, that a wrong one is refused, and that the right ones are right."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ByT5Tokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from command import make_workplace, words
from misa_engine.cli.main import main
from misa_engine.errors import UserError
from misa_engine.trainer import MisaMixin, MisaTrainer, lean
from misa_engine.trainer.lean import lean_options, short_batch
from models import TINY

VOCABULARY, HIDDEN = 384, 32


class MisaPlainTrainer(MisaMixin, Trainer):
    pass


class Allocations(TorchDispatchMode):
    """Shapes of all tensors of new memory that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in old:
                self.shapes.append(tuple(value.shape))
        return result

    def over_training(self, training: Trainer) -> set[tuple[int, ...]]:
        """Shapes of what the steps of a training allocate; setting it up copies weights to the host."""
        create = training.create_optimizer

        def create_optimizer(*args: Any) -> Any:
            optimizer = create(*args)
            self.shapes.clear()
            return optimizer

        training.create_optimizer = create_optimizer
        with self:
            training.train()
        return set(self.shapes)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    for name in ("transformers", "trl", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def records() -> Dataset:
    letters = torch.randint(97, 123, (24, 40), generator=torch.Generator().manual_seed(0)).tolist()
    texts = ["".join(map(chr, row))[: 20 + index % 20] for index, row in enumerate(letters)]
    return Dataset.from_dict({"prompt": [text[:5] for text in texts], "completion": [text[5:] for text in texts]})


def make_trainer(out: Path, data: Dataset, model: nn.Module | None = None, misa: dict | None = None, **options: Any):
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    common["gradient_checkpointing"] = False
    sizes = {"max_length": 64, "max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    model = TINY["llama"](vocab_size=VOCABULARY) if model is None else model
    args = SFTConfig(str(out), **{**common, **sizes, "logging_steps": 1, **options})
    misa = {"delta": 0.3, **(misa or {})}
    return MisaTrainer(model, args=args, train_dataset=data, processing_class=ByT5Tokenizer(), misa=misa)


# ---- the samples ----


def test_the_check_sees_the_first_samples_cut_to_where_their_labels_begin():
    ids = list(range(10, 210))
    masked = {"input_ids": ids, "completion_mask": [0] * 150 + [1] * 50}
    nothing = {"input_ids": ids, "labels": [-100] * 200}
    short = {"input_ids": [5, 6, 7]}
    batch = short_batch([nothing, masked, short, short], TINY["llama"](), torch.device("cpu"))
    start = 150 - lean.TOKENS // 4
    assert batch["input_ids"].shape == (2, lean.TOKENS)
    assert batch["input_ids"][0].tolist() == ids[start : start + lean.TOKENS]
    assert batch["labels"][0].tolist() == [-100] * 16 + ids[150 : start + lean.TOKENS]
    assert batch["labels"][1].tolist() == [5, 6, 7] + [-100] * (lean.TOKENS - 3)
    assert batch["attention_mask"].sum(1).tolist() == [lean.TOKENS, 3]
    assert short_batch([nothing], TINY["llama"](), torch.device("cpu")) is None


def test_a_stream_is_not_read_for_the_check():
    def stream():
        raise AssertionError("the stream was read")
        yield

    data = Dataset.from_dict({"x": [1]}).to_iterable_dataset().map(lambda row: next(stream()))
    batch = short_batch(data, TINY["llama"](), torch.device("cpu"))
    assert batch is not None and int(batch["input_ids"].max()) < 64


# ---- the verification ----


def wrong_loss(kind: str):
    """A loss of the kind that has been seen to be wrong somewhere."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, labels = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits, None
        labels = inputs["labels"]
        if kind != "not shifted":
            logits, labels = logits[:, :-1], labels[:, 1:]
        if kind == "mask ignored":
            labels = labels.clamp(min=0)
        if kind == "temperature":
            logits = logits * 1.5
        count = (labels != -100).sum() if kind == "items ignored" else num_items_in_batch
        total = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        loss = total / count
        if kind == "gradient doubled":
            loss = 2 * loss - loss.detach()
        if kind == "not a number":
            loss = loss * float("nan")
        return loss

    return compute_loss


@pytest.mark.parametrize(
    "kind",
    ["not shifted", "mask ignored", "temperature", "items ignored", "gradient doubled", "not a number"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_wrong_loss_is_an_error_before_the_first_step(kind, dtype, tmp_path, records, monkeypatch):
    model = TINY["llama"](vocab_size=VOCABULARY, initializer_range=0.3).to(dtype)
    training = make_trainer(tmp_path, records, model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(SFTTrainer, "compute_loss", wrong_loss(kind))
    found = "away from" if "gradient" in kind else ""
    with pytest.raises(UserError, match=f"would train this model wrongly.*{found}"):
        training.train()
    assert training.misa is None and not (tmp_path / "misa_log.jsonl").exists()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_installed_trainers_own_loss_passes(family, dtype, tmp_path, records, caplog):
    training = make_trainer(tmp_path, records, TINY[family](vocab_size=VOCABULARY).to(dtype))
    with caplog.at_level(logging.INFO, "misa_engine.trainer.lean"):
        training.check_loss()
    assert "lean forward checked: loss" in caplog.text


def test_the_check_leaves_no_trace(tmp_path, records, capfd):
    """Weights, gradients, flags, modes, metrics and random state are as before; and the second time costs nothing."""
    model = TINY["llama"](vocab_size=VOCABULARY, attention_dropout=0.5)
    training = make_trainer(tmp_path, records, model)
    training.check_loss()  # imports and lazy state
    training._loss_checked = False
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)

    def state() -> list[Any]:
        parameters = [(p.clone(), p.requires_grad, p.grad) for p in model.parameters()]
        modes = [module.training for module in model.modules()]
        return [parameters, modes, json.dumps(training._metrics), training._total_train_tokens, torch.get_rng_state()]

    before = state()
    capfd.readouterr()
    training.check_loss()
    after = state()
    assert capfd.readouterr() == ("", "")
    for (a, *flags), (b, *others) in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b) and flags == others and flags[-1] is None
    assert before[1:4] == after[1:4] and torch.equal(before[4], after[4])
    assert training._metrics["train"] == {}


def test_a_loss_that_is_not_plain_cross_entropy_is_left_alone(tmp_path, records, caplog):
    with caplog.at_level(logging.INFO, "misa_engine.trainer.lean"):
        make_trainer(tmp_path, records, loss_type="dft").check_loss()
        make_trainer(tmp_path, records, label_smoothing_factor=0.1).check_loss()
        rows = [[5, 6, 7, 8]] * 4
        masked = MisaPlainTrainer(
            TINY["bert"](),
            args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        )
        masked.check_loss()
    assert "loss_type is dft" in caplog.text and "label smoothing" in caplog.text
    assert "not a causal language model" in caplog.text and "checked" not in caplog.text


def test_the_check_makes_no_full_batch_of_logits(tmp_path, records):
    training = make_trainer(tmp_path, records, per_device_train_batch_size=16)
    watch = Allocations()
    with watch:
        training.check_loss()
    wide = [shape for shape in watch.shapes if shape and shape[-1] == VOCABULARY]
    # TRL's tile is as wide as its chunk of the vocabulary and is not counted here
    assert wide and max(torch.Size(shape).numel() for shape in wide) <= lean.SAMPLES * lean.TOKENS * VOCABULARY


# ---- misa train ----


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("lean"), tmp_path_factory.mktemp("cache"))


def test_misa_train_refuses_wrong_kernels_names_both_losses_and_deletes_nothing(
    workplace, tmp_path, monkeypatch, capsys
):
    """The kernels are imitated by a norm without its square root, put in where transformers puts in Liger's."""
    out = tmp_path / "out"
    assert main(words(workplace, out, max_steps=1)) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr("misa_engine.trainer.lean.lean_options", lambda *args, **options: {"use_liger_kernel": True})

    def patch(model, config):
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = lambda x, module=module: module.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6)

    monkeypatch.setattr("misa_engine.trainer.mixin.apply_liger_kernel", patch)
    capsys.readouterr()
    assert main(words(workplace, out, "--overwrite_output_dir")) == 2
    shown = capsys.readouterr().err
    assert "Liger's kernels would train this model wrongly: a loss of " in shown
    assert "the plain forward gives " in shown and "--use_liger_kernel false" in shown and "Traceback" not in shown
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert main(words(workplace, tmp_path / "new")) == 2
    assert not (tmp_path / "new").exists()


def test_misa_train_says_that_liger_needs_a_gpu_only_when_asked_for_it(workplace, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(words(workplace, tmp_path / "out", use_liger_kernel="true")) == 2
    assert "need a GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(words(workplace, tmp_path / "out", max_steps=1)) == 0
    shown = capsys.readouterr()
    assert "iger" not in shown.err + shown.out


# ---- the loss that TRL computes in chunks ----


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_a_frozen_head_costs_no_vocabulary_sized_gradient(head, packing, tmp_path, records):
    misa = {"always_train": ("lm_head",)} if head == "trained" else {}
    training = make_trainer(
        tmp_path, records, misa=misa, packing=packing, gradient_accumulation_steps=2, learning_rate=0.0
    )
    training.check_loss()
    found = (VOCABULARY, HIDDEN) in Allocations().over_training(training)
    assert found == (head == "trained"), "the watch sees a gradient where there is one"


@pytest.mark.parametrize("packing", [False, True])
def test_chunked_losses_add_up_to_plain_cross_entropy_over_packed_and_accumulated_batches(
    packing, tmp_path, records, monkeypatch
):
    """Each micro-batch against full float32 logits, with the step's count of tokens over all micro-batches."""
    training = make_trainer(tmp_path, records, packing=packing, gradient_accumulation_steps=3, learning_rate=0.0)
    training.check_loss()
    seen: list[tuple[float, float, int, int]] = []
    whole = SFTTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        labels = inputs["labels"]
        plain = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            logits = model(**plain, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        loss = whole(self, model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        seen.append((float(loss.detach()), float(total), int((labels[:, 1:] != -100).sum()), int(num_items_in_batch)))
        return loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    training.train()
    for step in range(2):
        micro = seen[3 * step : 3 * step + 3]
        items = sum(count for _, _, count, _ in micro)
        for loss, total, _, given in micro:
            assert given == items
            assert loss == pytest.approx(total / items, rel=1e-5)  # fp32 sums in another order


# ---- Liger itself ----

INTERPRETED = """
import json, sys
import torch
from datasets import Dataset
from transformers import TrainingArguments
from models import TINY
from misa_engine.trainer import lean
from test_lean import Allocations, MisaPlainTrainer

out = {}
rows = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
data = Dataset.from_dict({"input_ids": rows, "labels": rows})
for family in sys.argv[2:]:
    model = TINY[family](hidden_size=40)  # the vocabulary's 64 x 40 is no other matrix's size
    # Triton's interpreter cannot run Liger's RMSNorm and SwiGLU (a Python float has no .to)
    args = TrainingArguments(sys.argv[1], use_cpu=True, report_to="none", max_steps=2, save_strategy="no",
        gradient_accumulation_steps=2, per_device_train_batch_size=2, use_liger_kernel=True, disable_tqdm=True,
        liger_kernel_config={"rms_norm": False, "swiglu": False})
    training = MisaPlainTrainer(model, args=args, train_dataset=data, misa={"delta": 0.3})
    check = lean.LossCheck.before(training)
    training.check_loss()
    again, gradient = check._measure(
        lambda: training.compute_loss(model, dict(check._batch), num_items_in_batch=check._count))
    plain, plain_gradient = check._plain
    shapes = Allocations().over_training(training)
    apart = float((gradient - plain_gradient).norm() / gradient.norm())
    rows = max(shape[0] for shape in shapes if shape[1:] == (64,))
    out[family] = {"loss": again, "plain": plain, "gradient": apart, "rows": rows,
        "forward": model.forward.__func__.__module__, "head gradient": (64, 40) in shapes}
print(json.dumps(out))
"""


def test_ligers_own_cross_entropy_and_rope_are_right_and_spare_a_frozen_head(tmp_path):
    """The real kernels in Triton's interpreter, through the Trainer's use_liger_kernel."""
    pytest.importorskip("liger_kernel")
    families = ["llama"]
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(tmp_path), *families],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for family in families:
        entry = found[family]
        assert entry["forward"].startswith("liger_kernel")
        assert entry["loss"] == pytest.approx(entry["plain"], rel=1e-5)  # fp32 in another order
        assert entry["gradient"] < 1e-4 and not entry["head gradient"]
        assert entry["rows"] < 24, "all 24 tokens have their logits at once"


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "olmo2"])
def test_ligers_kernels_pass_the_check_and_train_on_a_gpu(family, tmp_path, records, caplog):
    pytest.importorskip("liger_kernel")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3}
    if family in ("qwen3", "gemma2"):
        sizes["head_dim"] = 32
    model = TINY[family](vocab_size=VOCABULARY, **sizes).bfloat16().cuda()
    options = lean_options(model.config.model_type, "cuda")
    assert options["use_liger_kernel"]
    training = make_trainer(tmp_path, records, model, use_cpu=False, **options)
    with caplog.at_level(logging.INFO, "misa_engine.trainer.lean"):
        training.train()
    assert "lean forward checked" in caplog.text
    assert any("iger" in type(m).__name__ or "liger" in m.forward.__module__ for m in model.modules())
