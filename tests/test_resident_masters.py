"""Where exact weights lie on the host: pinned pieces, pages of the model's own files, and what is saved from there."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from misa_engine import load_model
from misa_engine.engine.residents import Residents, open_mapped, rest, store
from misa_engine.engine.residents.masters import Masters, alone
from misa_engine.engine.residents.matrix import Resting
from resident_models import of, optimizer_for, resting, snapshot
from training import batches, loss_of, tiny, train


@pytest.fixture
def saved(tmp_path):
    model = tiny(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_mapped_tensors_are_those_of_the_file(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(4),
        "d": torch.zeros(0, 3),
        "e": torch.ones(5, dtype=torch.float8_e4m3fn),
        "f": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = open_mapped(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
    storages = {tensor.untyped_storage().data_ptr() for name, tensor in found.items() if name != "d"}
    assert len(storages) == 5  # each its own, so that nobody takes them for tied


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(5000), "b": torch.ones(5000)}, file)
    before = file.read_bytes()
    found = open_mapped(file)
    found["a"].add_(1)
    assert file.read_bytes() == before and torch.equal(open_mapped(file)["a"], torch.ones(5000))
    assert torch.equal(found["a"], torch.full((5000,), 2.0)) and torch.equal(found["b"], torch.ones(5000))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda data: data[:-10], "is cut off: .* ends at byte"),
        (lambda data: b"\xff" * 8 + data[8:], "no safetensors file: its header would be"),
        (lambda data: data[:8] + b"?" + data[9:], "no safetensors file: its header is not JSON"),
        (lambda data: data.replace(b'"F32"', b'"F31"'), "of dtype F31; weights are one of"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, complaint):
    save_file({"a": torch.ones(50)}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(damage((tmp_path / "x.safetensors").read_bytes()))
    with pytest.raises(ValueError, match=complaint):
        open_mapped(tmp_path / "x.safetensors")


def test_a_model_on_the_meta_device_takes_its_matrices_one_by_one(saved):
    """As a loader that streams does: masters are pages of the file, trained over, and the file keeps its bits."""
    file = saved / "model.safetensors"
    before = file.read_bytes()
    expected = tiny(dtype=torch.bfloat16)
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(saved), dtype=torch.bfloat16)
    residents = Residents(model, "int8", "cpu", masters="mapped")
    tensors = open_mapped(file)
    for name, tensor in tensors.items():
        if name in residents:
            residents.hold(name, tensor)
            assert model.get_parameter(name).data_ptr() == tensor.data_ptr()
        else:
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.register_parameter(name.rpartition(".")[2], torch.nn.Parameter(tensor))
    model.model.rotary_emb = expected.model.rotary_emb
    assert not any(parameter.is_meta for parameter in model.parameters())
    rest(expected, "int8")
    results = []
    for m in (model.train(), expected):
        train(m, optimizer_for(m), batches(), 6)
        results.append(snapshot(m))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[1])
    assert file.read_bytes() == before
    assert {m.get_parameter(name).is_leaf for m in (model,) for name in residents.names} == {True}


def test_save_pretrained_writes_from_the_masters_and_loads_again(saved, tmp_path):
    original = load_file(saved / "model.safetensors")
    model = load_model(saved, residents="int8", device="cpu")
    assert model.training and len(of(model).resting) == len(of(model).names)
    optimizer = optimizer_for(model, inner_steps=3)
    drawn = set(optimizer.active)
    train(model, optimizer, batches(), 4)
    drawn |= set(optimizer.active)
    storages = [tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()]
    assert len(set(storages)) == len(storages)  # transformers copies tensors that share one
    model.save_pretrained(tmp_path / "trained")
    assert set(json.loads((tmp_path / "trained" / "config.json").read_text())) >= {"model_type"}
    written = load_file(tmp_path / "trained" / "model.safetensors")
    assert written.keys() == original.keys()
    changed = {name for name in written if not torch.equal(written[name], original[name])}
    assert changed and changed <= drawn
    again = load_model(tmp_path / "trained", residents="int8", device="cpu")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    plain = load_model(tmp_path / "trained", device="cpu")
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_saving_over_the_files_that_masters_are_mapped_from_loses_nothing(saved):
    """transformers writes a new file; the pages of the old one live as long as the model."""
    model = tiny(dtype=torch.bfloat16)
    residents = Residents(model, "int8", "cpu", masters="mapped")
    tensors = open_mapped(saved / "model.safetensors")
    for name in residents.names:
        residents.hold(name, tensors[name])
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(), 3)
    before = snapshot(model)
    model.save_pretrained(saved)
    written = load_file(saved / "model.safetensors")
    assert all(torch.equal(written[name], before[name]) for name in written)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    train(model, optimizer, batches(), 3)


def test_a_switch_waits_for_the_masters_and_not_for_what_comes(monkeypatch):
    """On a GPU all of it is queued: what leaves is written back, an event marks that, and only that is waited for."""
    model, order = resting(), []
    optimizer = optimizer_for(model)
    for name in ("enter", "leave"):
        real = getattr(Resting, name)
        monkeypatch.setattr(Resting, name, lambda self, *args, n=name, f=real: (f(self, *args), order.append(n))[0])
    event = SimpleNamespace(synchronize=lambda: order.append("wait"))
    monkeypatch.setattr(store, "_event", lambda device: (order.append("mark"), event)[1])
    left = [name for name in optimizer.active if name in of(model)._matrices]
    optimizer.end_round()
    came = len([name for name in optimizer.active if name not in left])
    assert order[: (gone := order.count("leave"))] == ["leave"] * gone and gone > 0 and came > 0
    assert order[gone] == "mark" and order[-1] == "wait" and order.count("mark") == order.count("wait") == 1
    assert set(order[gone + 1 : -1]) == {"enter"}
    of(model).finish()  # nothing is under way
    assert order.count("wait") == 1


def test_masters_in_a_pool_are_copies_with_storages_of_their_own(monkeypatch):
    """As on a GPU, in ordinary memory: pieces of a pool, and the loaded tensor can go."""
    from misa_engine.engine.host_pool import HostPool, rounded

    shapes = [(40, 8), (16, 24), (3, 5)]
    masters = Masters("pinned", torch.device("cpu"), [])
    size = sum(rounded(2 * a * b) for a, b in shapes)
    masters._pool = HostPool(torch.device("cpu"), size, pieces=True)
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    held = [masters.take(weight) for weight in weights]
    assert all(torch.equal(master, weight) for master, weight in zip(held, weights, strict=True))
    assert len({master.untyped_storage().data_ptr() for master in held}) == 3
    assert all(master.untyped_storage().nbytes() == master.nbytes for master in held)
    assert not {master.data_ptr() for master in held} & {weight.data_ptr() for weight in weights}
    held[0].zero_()
    assert torch.equal(held[1], weights[1]) and not held[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stretch_alone_is_the_same_memory(dtype):
    whole = torch.zeros(100, dtype=dtype)
    part = alone(whole[10:30])
    part.fill_(1)
    assert whole.sum() == 20 and part.dtype == dtype and part.untyped_storage().nbytes() == part.nbytes


def test_what_does_not_fit_a_parameter_is_refused():
    residents = of(resting())
    name = residents.names[0]
    with pytest.raises(ValueError, match=f"{name} is .* got \\(2, 3\\) of torch.float32"):
        residents.hold(name, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="got .* of torch.bfloat16"):
        residents.hold(name, torch.zeros(residents.matrix(name).shape, dtype=torch.bfloat16))


def test_a_model_with_residents_trains_after_its_masters_were_mapped_from_the_hub_loader(saved):
    model = load_model(saved, residents="fp8", device="cpu", dtype=torch.float32, masters="mapped")
    losses = train(model, optimizer_for(model), batches(), 3)
    assert all(loss == loss for loss in losses) and loss_of(model, next(batches())).dtype == torch.float32
