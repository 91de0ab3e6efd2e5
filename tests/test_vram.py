"""misa train --max_vram_gb: plan, choice, refusal, and the trial step, on a tiny model."""

import pytest
import torch
from safetensors.torch import load_file

from command import make_workplace, words
from misa_engine.cli import vram
from misa_engine.cli.main import main
from misa_engine.planner.activations import MicroBatch
from misa_engine.planner.plan import plan

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("vram")
    return make_workplace(root, root / "cache", dtype=torch.bfloat16)


def weights_of(out):
    return load_file(out / "model.safetensors")


def test_a_run_within_the_limit_trains_as_it_would_without(place, capsys):
    shared = {"max_length": 32, "gradient_checkpointing": "true", "state_dtype": "float32"}
    assert main(words(place, place / "plain", **shared)) == 0
    assert main(words(place, place / "limited", max_vram_gb=4, **shared)) == 0
    plain, limited = weights_of(place / "plain"), weights_of(place / "limited")
    assert all(torch.equal(plain[name], limited[name]) for name in plain)  # the trial step left no trace
    assert "plan: 1.2" in capsys.readouterr().out  # context and slack are nearly all of it


def test_what_is_not_given_is_chosen_and_the_effective_batch_is_kept(place, capsys):
    options = {"max_length": 64, "gradient_checkpointing": None, "per_device_train_batch_size": None}
    options |= {"gradient_accumulation_steps": 3, "delta": None}
    out = place / "chosen"
    assert main(words(place, out, "--dry_run", max_vram_gb=4, **options)) == 2  # 3% is less than the largest matrix
    assert "delta" in capsys.readouterr().err
    assert main(words(place, out, max_vram_gb=4, **{**options, "delta": 0.3})) == 0
    printed = capsys.readouterr().out
    assert "per_device_train_batch_size 24," in printed and "gradient_checkpointing false" in printed


def test_an_impossible_limit_is_refused_before_anything_is_loaded_or_written(place, capsys, monkeypatch):
    monkeypatch.setattr(
        "misa_engine.cli.loading.load_model", lambda *args, **kwargs: pytest.fail("weights were loaded")
    )
    out = place / "refused"
    assert main(words(place, out, max_length=64, max_vram_gb=1)) == 2
    error = capsys.readouterr().err
    assert "does not fit into 1.00 GiB" in error and "smallest card" in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "text"), [({"optimizer": "adamw"}, "adamw"), ({"max_vram_gb": "lots"}, "max_vram_gb")], ids=str
)
def test_bad_combinations_are_refused(place, capsys, options, text):
    assert main(words(place, place / "bad", **{"max_length": 32, "max_vram_gb": 4, **options})) == 2
    assert text in capsys.readouterr().err


def test_running_out_of_memory_in_the_trial_ends_the_run_before_the_first_step(place, capsys, monkeypatch):
    from misa_engine.trainer.sft import MisaTrainer

    def no_room(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def compare_nothing(self):
        return None

    monkeypatch.setattr(MisaTrainer, "check_loss", compare_nothing)
    monkeypatch.setattr(MisaTrainer, "compute_loss", no_room)
    out = place / "oom"
    assert main(words(place, out, max_length=32, max_vram_gb=4)) == 2
    error = capsys.readouterr().err
    assert "a trial of 2 x 32 tokens" in error and "out of memory" in error
    assert not (out / "model.safetensors").exists()


def test_the_trial_covers_the_longest_sequence_with_the_worst_draw_and_restores_everything(place):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    from misa_engine.trainer.sft import MisaTrainer

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16)
    args = SFTConfig(
        output_dir=str(place / "trial"), per_device_train_batch_size=3, max_length=48, use_cpu=True, report_to=[],
        bf16=False, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 4})
    trainer = MisaTrainer(model=model, args=args, misa={"delta": 0.3, "rest": "none"}, train_dataset=rows)
    planned = plan(model.config, delta=0.3, rest="none", micro_batch=MicroBatch(3, 48, True, "chunked"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    seen = {}

    def watch(module, args, kwargs, output):
        seen["shape"] = tuple(kwargs["input_ids"].shape)
        seen["trains"] = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    handle = model.register_forward_hook(watch, with_kwargs=True)
    random_state = torch.get_rng_state()
    vram.dry_step(trainer, planned)
    handle.remove()
    assert seen["shape"] == (3, 48) and seen["trains"] == set(planned.worst_draw)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is None and torch.equal(parameter, before[name])
