from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indistill_fx.curriculum import Budget, Curriculum
from indistill_fx.errors import ConfigError


@given(a=st.integers(0, 9), count=st.integers(0, 9))
def test_layer_l_gets_a_plus_l_epochs(a, count):
    assert [budget.length for budget in Curriculum(a=a).schedule(count)] == [a + layer for layer in range(1, count + 1)]


def test_an_empty_sequence_of_lengths_is_no_warm_up():
    assert Curriculum(lengths=[]).chosen(["a", "b"]) == {}
    assert [budget.length for budget in Curriculum(lengths=[]).schedule(2)] == [0, 0]


def test_every_stage_may_have_its_own_rate_and_optimiser():
    first, second = Curriculum(
        lengths=[10, 20], unit="steps", learning_rate=[0.1, 0.2], optimizer=["sgd", "adam"]
    ).schedule(2)
    assert first == Budget(10, "steps", 0.1, "sgd")
    assert second == Budget(20, "steps", 0.2, "adam")


def test_a_last_stage_for_the_penultimate_vectors():
    curriculum = Curriculum(lengths=1, penultimate=3, learning_rate=[0.1, 0.2], optimizer=["sgd", "adamw", "adam"])
    assert list(curriculum.chosen(["a", "b"], "last").items()) == [
        ("a", Budget(1, "epochs", 0.1, "sgd")),
        ("b", Budget(1, "epochs", 0.2, "adamw")),
        ("last", Budget(3, "epochs", 0.2, "adam")),
    ]
    assert list(Curriculum(lengths=[], penultimate=1).chosen(["a", "b"], "last")) == ["last"]
    assert list(Curriculum(layers=["b"], penultimate=1).chosen(["a", "b"], "last")) == ["b", "last"]
    assert list(Curriculum(lengths=1).chosen(["a"], "last")) == ["a"]
    with pytest.raises(ConfigError, match="negative length"):
        Curriculum(penultimate=-1)


def test_order_and_subset():
    curriculum = Curriculum(lengths=[3, 4, 5], layers=["c", "a"])
    assert [(name, budget.length) for name, budget in curriculum.chosen(["a", "b", "c"]).items()] == [
        ("c", 5),
        ("a", 3),
    ]
    assert list(Curriculum().chosen(["a", "b"])) == ["a", "b"]


def test_describe_says_what_will_be_done():
    text = Curriculum(lengths=[1, 0, 5], patience=2, optimizer=["adam", "adam", "sgd"]).describe(["a", "b", "c"])
    assert text.splitlines() == [
        "a: at most 1 epoch, adam, learning rate 0.001, ends after 2 without 0.01 relative progress",
        "c: at most 5 epochs, sgd, learning rate 0.001, ends after 2 without 0.01 relative progress",
    ]
    assert Curriculum(lengths=[40], unit="steps").describe(["a"]) == "a: 40 steps, adam, learning rate 0.001"


@pytest.mark.parametrize(
    "options, said",
    [
        ({"a": -1}, "negative length"),
        ({"lengths": [1, -1]}, "negative length"),
        ({"unit": "days", "lengths": [1]}, "'days'"),
        ({"unit": "steps"}, "needs lengths"),
        ({"patience": 0}, "patience=0"),
        ({"patience": 2, "unit": "steps", "lengths": [5]}, "Give lengths in epochs"),
        ({"learning_rate": 0.0}, "learning rate is 0.0"),
        ({"learning_rate": [0.1, float("nan")]}, "numbers above 0"),
    ],
)
def test_impossible_curricula_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Curriculum(**options)


@pytest.mark.parametrize("options", [{"lengths": [1]}, {"learning_rate": [0.1]}, {"optimizer": ["adam"]}])
def test_sequences_must_fit_the_pairs(options):
    with pytest.raises(ConfigError, match=r"gives 1 .* for 2 pairs"):
        Curriculum(**options).schedule(2)


def test_unknown_and_repeated_layers_are_refused():
    with pytest.raises(ConfigError, match="Nearest: layer1"):
        Curriculum(layers=["layr1"]).chosen(["layer1", "layer2"])
    with pytest.raises(ConfigError, match="twice"):
        Curriculum(layers=["a", "a"]).chosen(["a"])
