"""MisaConfig: what a preset fills in, what counts as given, and option dictionaries of older runs."""

import copy
import json
import math
import pickle
from dataclasses import fields, replace

import pytest

from misa_engine import MISA, MisaConfig
from misa_engine.method.config import PRESET_OPTIONS, PRESETS, RETIRED
from training import tiny


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fills_what_is_not_given(preset):
    config = MisaConfig(preset=preset, fill="skip", score=None)
    for option in set(PRESET_OPTIONS) - {"fill"}:
        assert getattr(config, option) == getattr(PRESETS[preset], option)
    assert config.fill == "skip"


@pytest.mark.parametrize("preset", PRESETS)
def test_given_option_wins_over_the_preset_though_it_is_the_default_of_its_class(preset):
    defaults = {entry.name: entry.default for entry in fields(MisaConfig) if entry.name in PRESET_OPTIONS}
    config = MisaConfig(preset=preset, **defaults)
    assert {option: getattr(config, option) for option in PRESET_OPTIONS} == defaults


def test_config_knows_which_options_were_given():
    assert MisaConfig().given == frozenset()
    config = MisaConfig(lr=1e-5, preset="paper", ema=None)
    assert config.given == {"lr", "preset"}
    assert config == MisaConfig(preset="paper"), "whether an option was given is no part of its value"
    assert MisaConfig.from_dict({"lr": 1e-5}).given == {"lr"}
    for same in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config and same.given == config.given
    assert replace(config, delta=0.5).delta == 0.5 and replace(config, delta=0.5).ema == "plain"


@pytest.mark.parametrize("preset", PRESETS)
def test_options_survive_json(preset):
    config = MisaConfig(preset=preset, always_train="norm", static_weights={"*": 2.0}, exponent_cap=7.0)
    assert MisaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_options_of_an_older_run_are_read_unless_they_meant_something_else():
    old = {**MisaConfig(preset="official").to_dict(), **RETIRED}
    assert MisaConfig.from_dict(old) == MisaConfig(preset="official")
    with pytest.raises(ValueError, match="skip_nonfinite is no longer an option; it is always True, got False"):
        MisaConfig.from_dict({**old, "skip_nonfinite": False})


def test_checkpoint_of_an_older_run_loads_unless_it_did_something_else():
    state = MISA(tiny(), delta=0.3).state_dict()
    state["misa"]["config"].update(RETIRED)
    MISA(tiny(), delta=0.3).load_state_dict(state)
    state["misa"]["config"]["skip_nonfinite"] = False
    with pytest.raises(ValueError, match="skip_nonfinite: False in the checkpoint, always True here"):
        MISA(tiny(), delta=0.3).load_state_dict(state)


def test_options_are_keywords_and_positions_are_refused():
    with pytest.raises(TypeError):
        MisaConfig(1e-5)


def test_infinite_cap_is_allowed_and_not_a_number_is_not():
    assert MisaConfig(exponent_cap=math.inf).exponent_cap == math.inf
    for cap in (0.0, math.nan):
        with pytest.raises(ValueError, match="exponent_cap must be larger than 0"):
            MisaConfig(exponent_cap=cap)


def test_an_altered_config_still_knows_what_was_given():
    config = MisaConfig(preset="paper", delta=0.1, fill="skip").altered(delta=0.2)
    assert config == MisaConfig(preset="paper", delta=0.2, fill="skip")
    assert config.given == {"preset", "delta", "fill"}


def test_a_presets_rest_rule_can_be_left_out_and_a_given_one_stays():
    assert MisaConfig().rest == "row_norm" and MisaConfig().altered(run_steps=5).without_own_rest().rest == "none"
    for given in ({"rest": "sign"}, {"rest_lr": 0.1}):
        config = MisaConfig(**given)
        assert config.without_own_rest() is config
