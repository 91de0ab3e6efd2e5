"""What a user may try with the optimizer object, and the one line that answers."""

import copy
import gc
import math
import pickle

import pytest
import torch

from misa_engine import MISA
from training import batches, tiny, train


def test_parameters_in_place_of_the_model_are_refused_with_the_right_call():
    with pytest.raises(TypeError, match=r"MISA\(model, lr=\.\.\.\)"):
        MISA(tiny().parameters(), lr=1e-3)
    with pytest.raises(TypeError, match="options go by name"):
        MISA(tiny(), 1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named_before_anything_is_frozen(bad):
    model = tiny(dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4:6] = bad
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has 2"):
        MISA(model, delta=0.3)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps])
def test_optimizer_is_not_copied_or_pickled(copied):
    optimizer = MISA(tiny(), delta=0.3)
    with pytest.raises(TypeError, match="state_dict"):
        copied(optimizer)


def test_second_optimizer_is_refused_until_the_first_is_removed():
    model = tiny()
    first = MISA(model, delta=0.3)
    with pytest.raises(ValueError, match=r"another MISA.*remove\(\)"):
        MISA(model, delta=0.3)
    with pytest.raises(ValueError, match="another MISA"):
        MISA(model.model, delta=0.5)
    state = first.state_dict()
    first.remove()
    MISA(model, delta=0.3).load_state_dict(state)
    MISA(copy.deepcopy(model).requires_grad_(True), delta=0.3)


def test_claim_on_a_model_ends_with_it():
    for _ in range(3):
        MISA(tiny(), delta=0.3)
        gc.collect()


def test_sparse_embedding_is_refused_only_where_it_would_train():
    model = tiny("llama", tie_word_embeddings=False)
    model.model.embed_tokens.sparse = True
    with pytest.raises(ValueError, match=r"embed_tokens is an embedding with sparse=True"):
        MISA(model, delta=0.3, always_train="embed_tokens")
    train(model, MISA(model, delta=0.3), batches(), 2)


@pytest.mark.parametrize("update_in", ["step", "backward"])
def test_sparse_gradient_that_comes_later_is_refused(update_in):
    model = tiny("llama", tie_word_embeddings=False)
    MISA(model, delta=0.3, always_train="embed_tokens", update_in=update_in)
    model.model.embed_tokens.sparse = True
    ids = next(batches())
    with pytest.raises(ValueError, match="torch.sparse_coo"):
        model(input_ids=ids, labels=ids).loss.backward()


def test_repr_shows_budget_and_active_units():
    optimizer = MISA(tiny(), delta=0.3, inner_steps=7)
    text = repr(optimizer)
    for part in ("delta=0.3", "inner_steps=7", f"{optimizer.budget:,}", *optimizer.active):
        assert part in text
