import pytest
import torch

from misa_engine import MISA, MisaConfig
from misa_engine.cli.preview import memory_table, preview, preview_adamw
from misa_engine.errors import UserError
from training import tiny


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"update_in": "backward"}, {"preset": "paper"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_preview_is_what_the_optimizer_then_does_and_touches_nothing(options, dtype):
    model, config = tiny(dtype=dtype), MisaConfig(delta=0.2, seed=3, **options)
    shown = preview(model, config)
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer = MISA(model, config)
    sizes = {unit.name: unit.numel for unit in optimizer.units}
    drawn = shown.split("of the budget:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split() for line in drawn] == [[name, f"{sizes[name]:,}"] for name in optimizer.active]
    assert shown.endswith(memory_table(optimizer.memory()))
    assert "first draw" not in preview(tiny(dtype=dtype), config, fresh=False)


def test_the_baseline_holds_four_copies():
    model = tiny()
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert memory_table(dict.fromkeys(("weights", "gradients", "exp_avg", "exp_avg_sq"), size)) in preview_adamw(model)


@pytest.mark.parametrize(
    "options",
    [{"delta": 1e-4}, {"frozen": ("nothing*",)}, {"parameter_groups": ({"pattern": "no", "lr": 1.0},)}],
    ids=str,
)
def test_what_the_optimizer_would_refuse_is_refused(options):
    config = MisaConfig(**{"delta": 0.2, **options})
    with pytest.raises(UserError) as caught:
        preview(tiny(), config)
    with pytest.raises(ValueError) as refused:
        MISA(tiny(), config)
    assert str(caught.value) == str(refused.value)
