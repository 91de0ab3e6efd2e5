"""A plain Trainer with MisaFactory whose checkpoints prove themselves."""

from datasets import Dataset
from transformers import Trainer, TrainingArguments

from misa_engine.trainer import ManifestCallback, MisaFactory, last_good_checkpoint
from misa_engine.trainer.manifest import MANIFEST, why_damaged
from models import TINY
from training import changed, weights


def plain_trainer(out, steps):
    rows = [[5 + index, 6, 7, 8, 9, 10] for index in range(8)]
    return Trainer(
        TINY["llama"](),
        args=TrainingArguments(
            str(out),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        optimizer_cls_and_kwargs=(MisaFactory, {"delta": 0.3, "inner_steps": 2, "lr": 1e-2}),
        callbacks=[ManifestCallback()],
    )


def test_a_plain_trainers_checkpoints_are_listed_and_the_last_good_one_is_resumed_exactly(tmp_path):
    assert last_good_checkpoint(tmp_path) is None
    whole = plain_trainer(tmp_path, 6)
    whole.train()
    checkpoints = [tmp_path / f"checkpoint-{step}" for step in (2, 4, 6)]
    assert all((folder / MANIFEST).is_file() and why_damaged(folder) is None for folder in checkpoints)
    assert last_good_checkpoint(tmp_path) == str(checkpoints[2])
    (checkpoints[2] / MANIFEST).unlink()  # killed before the callback was done
    content = bytearray((checkpoints[1] / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoints[1] / "model.safetensors").write_bytes(content)
    assert last_good_checkpoint(tmp_path) == str(checkpoints[0])
    resumed = plain_trainer(tmp_path, 6)
    resumed.train(resume_from_checkpoint=last_good_checkpoint(tmp_path))
    assert changed(weights(whole.model), resumed.model) == set()
