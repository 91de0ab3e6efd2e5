"""lm-eval's tasks through its Python API, on local files in the shapes of the hub's data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from misa_engine.errors import UserError
from misa_engine.evaluation import Settings, Subject, evaluate, harness
from misa_engine.evaluation.harness import metrics_of, records_of
from misa_engine.evaluation.local_data import REVISIONS, DataSource, split_files
from misa_engine.evaluation.tasks import tasks_named

GSM8K = [
    {"question": f"Ann has {n} nuts and finds 1. How many?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
    for n in range(2, 8)
]
ARC = [
    {
        "id": f"Q{n}", "question": f"Gas number {n}?", "answerKey": "AB"[n % 2],
        "choices": {"text": ["oxygen", "iron"], "label": ["A", "B"]},
    }
    for n in range(6)
]  # fmt: skip
MMLU = [{"question": "2+2?", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 3}] * 5


def jsonl(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def parquet(path: Path, records: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


@pytest.fixture
def data(tmp_path):
    """As ``hf download`` leaves them: parquet in a folder of the configuration; and lines of JSON by hand."""
    folder = tmp_path / "data"
    for split in ("train", "test"):
        jsonl(folder / f"openai/gsm8k/main/{split}.jsonl", GSM8K)
    for split in ("train", "validation", "test"):
        parquet(folder / f"allenai/ai2_arc/ARC-Easy/{split}-00000-of-00001.parquet", ARC)
    for split in ("test", "dev"):
        parquet(folder / f"cais/mmlu/abstract_algebra/{split}-00000-of-00001.parquet", MMLU)
    return folder


# ---- without lm-eval ----


def test_splits_are_found_in_the_hubs_layouts(data, tmp_path):
    assert set(split_files(data / "openai/gsm8k", "main")) == {"train", "test"}
    found = split_files(data / "cais/mmlu", "abstract_algebra")
    assert set(found) == {"test", "dev", "validation"} and found["validation"] == found["dev"]
    assert split_files(data / "cais/mmlu", "anatomy") == {}
    jsonl(tmp_path / "one/ifeval_input_data.jsonl", [{"key": 1}])
    assert set(split_files(tmp_path / "one", None)) == {"train"}
    for part in (0, 1):
        parquet(tmp_path / f"two/data/validation-0000{part}-of-00002-abc.parquet", ARC)
    (tmp_path / "two/dataset_infos.json").write_text("{}")
    assert [len(files) for files in split_files(tmp_path / "two", None).values()] == [2]


def test_local_files_stand_in_for_the_hub_and_their_digests_are_kept(data):
    import datasets

    original, source = datasets.load_dataset, DataSource(data)
    with source.in_place():
        found = datasets.load_dataset("openai/gsm8k", "main")
        assert found["test"][0] == GSM8K[0] and len(found["train"]) == 6
        assert datasets.load_dataset("openai/gsm8k", "main") is found
        assert datasets.load_dataset(path="allenai/ai2_arc", name="ARC-Easy")["validation"][1] == ARC[1]
    assert datasets.load_dataset is original
    assert len(source.used) == 5 and all(len(digest) == 64 for digest in source.used.values())


def test_missing_data_is_refused_with_the_command_that_gets_it(data):
    import datasets

    command = f"hf download Rowan/hellaswag --repo-type dataset --revision {REVISIONS['Rowan/hellaswag']} --local-dir"
    for folder, place in ((data, f"{data}/Rowan/hellaswag"), (None, "data/Rowan/hellaswag")):
        with DataSource(folder).in_place(), pytest.raises(UserError, match=f"cannot be had.*{command} {place}"):
            datasets.load_dataset("Rowan/hellaswag")
    with (
        DataSource(data).in_place(),
        pytest.raises(UserError, match="holds no files of anatomy.*hf download cais/mmlu"),
    ):
        datasets.load_dataset("cais/mmlu", "anatomy")


def test_revisions_are_whole_commits():
    assert all(len(revision) == 40 and int(revision, 16) for revision in REVISIONS.values())


def test_samples_become_records_with_a_metric_for_each_filter():
    samples = {
        "gsm8k": [
            {"doc_id": 0, "filter": "strict-match", "metrics": ["exact_match"], "exact_match": 0.0, "target": "72",
             "filtered_resps": ["[invalid]"], "doc_hash": "a"},
            {"doc_id": 0, "filter": "flexible-extract", "metrics": ["exact_match"], "exact_match": 1.0, "target": "72",
             "filtered_resps": ["72"], "doc_hash": "a"},
        ]
    }  # fmt: skip
    (record,) = records_of(samples)
    assert record.id == "gsm8k/0"
    assert record.metrics == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    assert record.detail["answer"] == {"strict-match": ["[invalid]"], "flexible-extract": ["72"]}


def test_values_and_errors_are_lm_evals_own():
    results = {"acc,none": 0.25, "acc_stderr,none": 0.1, "acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A",
               "alias": "arc", "sample_len": 4}  # fmt: skip
    found = metrics_of({"results": {"arc": results}}, "arc", 4)
    assert {name: (one.value, one.stderr, one.n) for name, one in found.items()} == {
        "acc": (0.25, 0.1, 4),
        "acc_norm": (0.5, None, 4),
    }


def test_a_task_whose_package_is_missing_says_what_to_install(monkeypatch, data):
    class Manager:
        def load(self, names):
            raise ModuleNotFoundError("No module named 'langdetect'", name="langdetect")

    monkeypatch.setattr(harness, "manager", Manager)
    with pytest.raises(UserError, match="ifeval needs the package langdetect, .* pip install langdetect"):
        harness.HarnessTask("ifeval").facts(Settings(data=data))


def test_without_lm_eval_an_unknown_task_says_what_to_install(monkeypatch):
    monkeypatch.setattr(harness, "installed", lambda: False)
    with pytest.raises(UserError, match=r"unknown task 'gsm8k'.*pip install 'misa_engine\[eval\]'"):
        tasks_named(["gsm8k"])


# ---- with it ----


@pytest.fixture(scope="module")
def lm_eval():
    """The real harness with an index of a few folders: all 14,000 tasks take ten seconds to read."""
    package = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'misa_engine[eval]'")
    from lm_eval.tasks import TaskManager

    folder = Path(package.__file__).parent / "tasks"
    harness.manager.cache_clear()
    index = TaskManager(
        include_path=[folder / name for name in ("gsm8k", "arc", "mmlu/default")], include_defaults=False
    )
    patch = pytest.MonkeyPatch()
    patch.setattr(harness, "manager", lambda: index)
    yield index
    patch.undo()


@pytest.fixture(scope="module")
def subjects():
    from transformers import ByT5Tokenizer

    from training import tiny

    tokenizer = ByT5Tokenizer()

    def make(label: str, scale: float) -> Subject:
        model = tiny(vocab_size=384, max_position_embeddings=512).eval()
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        return Subject(label, f"/models/{label}", lambda: model, lambda: tokenizer, digest=label)

    return lambda: (make("base", 1.0), make("other", -1.0))


def test_accuracies_are_lm_evals_and_pairs_are_of_its_documents(lm_eval, subjects, data, tmp_path):
    base, other = subjects()
    settings = Settings(data=data, limit=4)
    found = evaluate([other], ["arc_easy"], tmp_path / "out", base=base, settings=settings, say=str)
    for one in found.results:
        assert list(one.metrics)[:2] == ["acc", "acc_norm"] and one.metrics["acc"].n == 4
        mean = sum(record.metrics["acc"] for record in one.records) / 4
        assert one.metrics["acc"].value == pytest.approx(mean) and one.protocol == "lm-eval"
        assert one.metrics["acc"].stderr is not None
        assert "allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet" in one.settings["data"]
    gain = found.against_reference("other", "arc_easy", "acc")
    first, second = found.of("other", "arc_easy"), found.of("base", "arc_easy")
    assert gain.difference == pytest.approx(first.metrics["acc"].value - second.metrics["acc"].value)
    said: list[str] = []
    evaluate([other], ["arc_easy"], tmp_path / "out", base=base, settings=settings, say=said.append)
    assert all("done before" in line for line in said)


def test_the_choice_of_the_likelier_answer_is_ours(lm_eval, subjects, data, tmp_path):
    """By hand: the log-likelihood of each answer after the prompt, summed over its bytes."""
    base, _ = subjects()
    found = evaluate([base], ["arc_easy"], tmp_path, settings=Settings(data=data, limit=2), say=str)
    for record, document in zip(found.results[0].records, ARC, strict=False):
        prompt = base.tokenizer(f"Question: {document['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
        scores = []
        for text in document["choices"]["text"]:
            answer = base.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = base.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer)))
        chosen = "AB"[scores.index(max(scores))]
        assert record.metrics["acc"] == float(chosen == document["answerKey"])


def test_generated_answers_and_groups_work(lm_eval, subjects, data, tmp_path, monkeypatch):
    base, _ = subjects()
    settings = Settings(data=data, limit=2, num_fewshot=1, batch_size=2)
    tasks = ["gsm8k", "mmlu_abstract_algebra"]
    found = evaluate([base], tasks, tmp_path, settings=settings, say=str)
    gsm8k, mmlu = found.results
    assert set(gsm8k.metrics) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert gsm8k.settings["n_shot"] == {"gsm8k": 1} and "acc" in mmlu.metrics


def test_memory_that_ends_halves_the_batch_of_lm_eval(lm_eval, subjects, data, tmp_path, monkeypatch):
    base, _ = subjects()
    forward, sizes = base.model.forward, []

    def small(input_ids=None, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(base.model, "forward", small)
    settings = Settings(data=data, limit=4, batch_size=8)
    found = evaluate([base], ["arc_easy"], tmp_path, settings=settings, say=str)
    assert found.results[0].batch_size == 2 and max(sizes) > 2


def test_the_batch_is_planned_for_the_longest_request(lm_eval, subjects, data, tmp_path, monkeypatch):
    from misa_engine.evaluation import batch_size

    base, _ = subjects()
    asked = []

    def planned(model, *, length, beams=1, generates=False):
        asked.append((length, generates))
        return 3

    monkeypatch.setattr(batch_size, "batch_that_fits", planned)
    tasks, settings = ["arc_easy", "gsm8k"], Settings(data=data, limit=2, num_fewshot=0)
    found = evaluate([base], tasks, tmp_path, settings=settings, say=str)
    longest = max(len(f"Question: {one['question']}\nAnswer: oxygen") for one in ARC)
    assert asked[0] == (longest + 1, False) and asked[1][1]  # a byte tokenizer, which ends each text
    assert [one.batch_size for one in found.results] == [3, 3]


def test_tasks_that_run_generated_code_are_refused(lm_eval, subjects, data, monkeypatch):
    (task,) = tasks_named(["arc_easy"])
    task._load(Settings(data=data))
    task._tasks["arc_easy"].UNSAFE_CODE = True
    with pytest.raises(UserError, match="runs code that the model writes"):
        task.check([], Settings(data=data))


def test_names_tags_and_bad_data(lm_eval, subjects, data, tmp_path):
    assert [task.name for task in tasks_named(["ai2_arc"])] == ["arc_challenge", "arc_easy"]
    with pytest.raises(UserError, match="Did you mean gsm8k"):
        tasks_named(["gsmk8"])
    with pytest.raises(UserError, match="has no chat template"):
        base, _ = subjects()
        evaluate([base], ["arc_easy"], tmp_path / "out", settings=Settings(data=data, prompt="chat"), say=str)
    jsonl(data / "openai/gsm8k/main/test.jsonl", [{"problem": "?"}])
    with pytest.raises(UserError, match="lm-eval cannot make gsm8k of its data"):
        tasks_named(["gsm8k"])[0].check([], Settings(data=data))
    assert not (tmp_path / "out").exists()
