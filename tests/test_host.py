"""What is kept of units that left: residual bits (exact masters for ever) and moments."""

import pytest
import torch

from misa_engine import MISA
from misa_engine.engine import host
from misa_engine.engine.arena import Arena, padded
from misa_engine.kernels.split_float import join
from training import batches, tiny, train, weights


def masters(model, optimizer):
    """The float32 master of every unit that was ever active, wherever its lower half lies."""
    held = optimizer.host.state_dict()
    result = {}
    for unit in optimizer.units:
        weight = model.get_parameter(unit.name).detach().view(-1)
        if unit.name in optimizer.arena.names:
            slot = optimizer.arena.slots[optimizer.arena.names.index(unit.name)]
            low = optimizer.arena.residual[slot.start : slot.start + slot.numel]
        elif unit.name in held:
            low = held[unit.name][1]["residual_bits"][: weight.numel()]
        else:
            continue
        result[unit.name] = join(weight, low)
    return result


# ---- residual bits ----


def constant_gradients(model, optimizer, sign):
    for name in optimizer.active:
        weight = model.get_parameter(name)
        weight.grad = sign[name].to(weight.dtype)


@pytest.mark.parametrize(
    "leave_rounding,moves", [("nearest", False), ("stochastic", True), ("keep", True)], ids=lambda value: str(value)
)
def test_small_steps_survive_leaving(leave_rounding, moves):
    # lr 1e-6 and T = 50: a round moves a weight by 5e-5, less than half a bf16 ulp (6e-5) of one between 2^-6 and 2^-5.
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama", dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 2:
                    p.copy_((0.02 + 0.008 * torch.rand(p.shape, generator=generator)).to(torch.bfloat16))
        sign = {name: torch.where(p.float() > 0.024, 1.0, -1.0) for name, p in model.named_parameters()}
        start = weights(model)
        rule = {"rule": "cyclic", "cold_start": "none", "revisit": "clear", "leave_rounding": leave_rounding}
        optimizer = MISA(model, rest="none", lr=1e-6, delta=0.3, inner_steps=50, **rule)
        while optimizer.round < 24:  # each unit several times
            constant_gradients(model, optimizer, sign)
            optimizer.step()
        names = [unit.name for unit in optimizer.units if optimizer.tracker.visits[optimizer.units.index(unit)] > 2]
        names = [name for name in names if name not in optimizer.active]
        assert len(names) > 5
        runs[dtype] = {name: (model.get_parameter(name).float() - start[name].float()) for name in names}
        if leave_rounding == "keep" and dtype == torch.bfloat16:
            exact = masters(model, optimizer)
    wanted, got = runs[torch.float32], runs[torch.bfloat16]
    assert wanted.keys() == got.keys()
    for name, moved in wanted.items():
        drift = moved.abs().mean()
        assert drift > 9e-5  # at least two rounds of 50 steps of 1e-6
        if not moves:
            assert bool((got[name] == 0).all())
            continue
        mean = (got[name] * torch.sign(moved)).mean()
        # One ulp is 1.2e-4; over n elements the mean of rounding errors of that size is 1.2e-4/sqrt(n) at most.
        assert abs(mean - drift) < 4 * 1.2e-4 / moved.numel() ** 0.5 + (1.2e-4 if leave_rounding == "keep" else 0)
        if leave_rounding == "keep":
            start_of = model.get_parameter(name).float() - got[name]
            # the master, not its upper half: as float32 did, to the rounding of 100 float32 sums
            torch.testing.assert_close(exact[name] - start_of.view(-1), moved.view(-1), rtol=2e-3, atol=1e-8)


def test_kept_residual_bits_come_back_bit_for_bit():
    model = tiny("llama", torch.bfloat16)
    optimizer = MISA(model, rest="none", lr=1e-3, delta=0.3, inner_steps=1, leave_rounding="keep")
    data = batches()
    seen_again = 0
    for _ in range(40):
        before, active = masters(model, optimizer), set(optimizer.active)
        train(model, optimizer, data, 1)
        after = masters(model, optimizer)
        for name in set(before) - active:  # inactive in this step, wherever its halves went
            assert torch.equal(before[name], after[name]), name
        seen_again += len((set(optimizer.active) - active) & set(before))
    assert seen_again > 10
    assert optimizer.memory()["host_residual_bits"] > 0 and optimizer.memory()["host_moments"] == 0


def test_kept_residual_bits_follow_the_float32_model():
    # Forward passes see only the upper half, so gradients are given: the same to both models, drawn once.
    noise = torch.Generator().manual_seed(1)
    model, twin = tiny("llama", torch.bfloat16), tiny("llama", torch.float32)
    twin.load_state_dict(model.float().state_dict())
    model = model.to(torch.bfloat16)
    options = {"lr": 1e-4, "delta": 0.3, "inner_steps": 3, "rule": "uniform", "seed": 3}
    a, b = MISA(model, rest="none", leave_rounding="keep", **options), MISA(twin, rest="none", **options)
    for _ in range(60):
        assert a.active == b.active
        for name in a.active:
            gradient = torch.randn(twin.get_parameter(name).shape, generator=noise).to(torch.bfloat16)
            model.get_parameter(name).grad, twin.get_parameter(name).grad = gradient, gradient.float()
        a.step(), b.step()
        a.zero_grad(), b.zero_grad()
    for name, master in masters(model, a).items():
        assert torch.equal(master, twin.get_parameter(name).detach().view(-1)), name


# ---- moments ----


def filled(state_dtype="float32", numels=(1500, 5000)):
    """An arena with two bound parameters and moments in the usual proportion, v about m squared."""
    generator = torch.Generator().manual_seed(0)
    parameters = {f"p{k}": torch.zeros(n, dtype=torch.bfloat16) for k, n in enumerate(numels)}
    arena = Arena(10240, 4, dtype=torch.bfloat16, device=torch.device("cpu"), split=True, state_dtype=state_dtype)
    arena.bind(parameters, dict.fromkeys(parameters, 0), {})
    for slot in arena.slots:
        here, groups = (
            slice(slot.start, slot.start + slot.numel),
            slice(slot.start // 64, (slot.start + slot.numel) // 64),
        )
        if state_dtype == "int8":
            arena.exp_avg[here] = torch.randint(-127, 128, (slot.numel,), generator=generator, dtype=torch.int8)
            arena.exp_avg_sq[here] = torch.randint(0, 256, (slot.numel,), generator=generator, dtype=torch.uint8)
            arena.exp_avg_scale[groups].uniform_(generator=generator)
            arena.exp_avg_sq_scale[groups].uniform_(generator=generator)
        else:
            arena.exp_avg[here] = 1e-6 * torch.randn(slot.numel, generator=generator)
            arena.exp_avg_sq[here] = 1e-14 * torch.randn(slot.numel, generator=generator).square()
        arena.residual[here] = torch.randint(-32768, 32768, (slot.numel,), generator=generator, dtype=torch.int16)
    return arena, parameters


def contents(arena, index):
    slot = arena.slots[index]
    buffers = {**arena.moments(), "residual_bits": arena.residual}
    return {name: arena.stretch(b, slot.start, padded(slot.numel)).clone() for name, b in buffers.items()}


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("chunk", [host.CHUNK, 1024])
def test_moments_come_back_as_they_left(monkeypatch, pack, state_dtype, chunk):
    monkeypatch.setattr(host, "CHUNK", chunk)
    arena, parameters = filled(state_dtype)
    store = host.HostStore(arena, moments=True, pack=pack, residual=True, backend="reference")
    before = [contents(arena, 0), contents(arena, 1)]
    assert store.leave("p0", 0, step=7) > 0 and store.leave("p1", 1, step=9) > 0
    # in the other order, so at other places
    arena.bind({}, {}, {})
    arena.bind(dict(reversed(parameters.items())), dict.fromkeys(parameters, 0), {})
    for index, name in enumerate(arena.names):
        assert store.enter(name, index) > 0
        assert store.enter(name, index) == 0  # it is in the arena now
    assert arena.table.slot_step[:2].tolist() == [9, 7]
    for index, old in ((1, before[0]), (0, before[1])):
        new = contents(arena, index)
        for category, tensor in old.items():
            if pack and state_dtype == "float32" and category != "residual_bits":
                largest = tensor.view(-1, 64).abs().amax(1, keepdim=True).expand(-1, 64).reshape(-1)
                # In units of the group's largest: m by softsign codes, whose coarsest step is 2/127 near 1, so at most
                # 1/127; sqrt(v) by steps of 1/255, so v by 2·(1/510), and (1/255)² more where it is lifted off zero.
                bound = (1 / 127 if category == "first_moment" else 1 / 255 + 255**-2) * 1.001
                assert bool(((new[category] - tensor).abs() <= bound * largest).all()), category
            else:
                assert torch.equal(new[category], tensor), category


def test_eight_bits_take_two_and_an_eighth_bytes_and_the_buffers_are_used_again():
    arena, _ = filled()
    store = host.HostStore(arena, moments=True, pack=True, residual=False, backend="reference")
    store.leave("p1", 1, step=1)
    assert store.bytes()["host_moments"] == 5120 * 2 + 5120 // 64 * 8
    first = {tensor.data_ptr() for tensor in store.state_dict()["p1"][1].values()}
    store.enter("p1", 1)
    store.leave("p1", 1, step=2)
    assert {tensor.data_ptr() for tensor in store.state_dict()["p1"][1].values()} == first


@pytest.mark.parametrize("revisit", ["keep", "offload"])
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_a_unit_that_comes_back_goes_on_counting_its_steps(revisit, state_dtype):
    model = tiny()
    optimizer = MISA(model, lr=1e-3, delta=0.3, inner_steps=3, rule="cyclic", revisit=revisit, state_dtype=state_dtype)
    made = {unit.name: 0 for unit in optimizer.units}
    data = batches()
    for _ in range(60):
        for name in optimizer.active:
            slot = optimizer._intake.slot_of[name]
            assert int(optimizer.arena.table.slot_step[slot]) == made[name]
            stretch = optimizer.arena.slots[slot]
            alive = optimizer.arena.exp_avg[stretch.start : stretch.start + stretch.numel].any()
            assert bool(alive) == (made[name] > 0)
            made[name] += 1
        train(model, optimizer, data, 1)
    assert min(made.values()) > 6


@pytest.mark.parametrize(
    "options",
    [{"leave_rounding": "keep"}, {"revisit": "offload"}, {"revisit": "offload", "state_dtype": "int8"}],
    ids=str,
)
def test_resume_with_host_state_is_bitwise_exact(options, tmp_path):
    def build(model):
        return MISA(model, rest="none", lr=1e-2, delta=0.3, inner_steps=3, **options)

    whole, parts = tiny("llama", torch.bfloat16), tiny("llama", torch.bfloat16)
    optimizer = build(whole)
    train(whole, optimizer, batches(), 40)
    data = batches()
    first = build(parts)
    train(parts, first, data, 23)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    first.remove()
    second = build(parts)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(parts, second, data, 17)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(p, q)
