"""Options are declared once: the keyword arguments, the command line and run.json follow."""

from __future__ import annotations

from typing import get_type_hints

import click
import pytest

from indistill_fx.cli import train
from indistill_fx.curriculum import Budget
from indistill_fx.errors import ConfigError
from indistill_fx.training.options.settings import Options, Settings, about, hints


def test_the_keyword_arguments_are_the_settings():
    assert get_type_hints(Options) == hints()


def test_the_command_line_has_every_option_with_its_default_and_its_text():
    shown = {option.name: option for option in train.command.params if isinstance(option, click.Option)}
    for name in hints():
        default = shown[name].get_default(click.Context(train.command))
        assert default == getattr(Settings(), name), name
        assert shown[name].help == about(name).help


@pytest.mark.parametrize(("asked", "value"), [([], "auto"), (["--graphs"], True), (["--no-graphs"], False)])
def test_the_flags_of_an_option_with_three_values(asked, value):
    context = train.command.make_context("train", ["model", "--data", "digits", "-o", "run", *asked])
    assert context.params["graphs"] is value


@pytest.mark.parametrize("flag", ["--mixed-precision", "--precision"])
def test_an_option_with_two_names(flag):
    context = train.command.make_context("train", ["model", "--data", "digits", "-o", "run", flag, "bf16"])
    assert context.params["mixed_precision"] == "bf16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, "learning_rate is 0. Expected: a number above 0"),
        ({"learning_rate": float("nan")}, "a number above 0"),
        ({"learning_rate": "fast"}, "a number above 0"),
        ({"momentum": -0.1}, "a number, 0 or more"),
        ({"accumulate": 1.5}, "an integer, 1 or more"),
        ({"accumulate": True}, "an integer, 1 or more"),
        ({"clip_norm": 0}, "a number above 0, or None"),
        ({"checkpoint_every_steps": 0}, "an integer, 1 or more, or None"),
        ({"seed": 1 << 63}, "an integer, 0 or more"),
        ({"compile": "yes"}, "True or False"),
        ({"schedule": "step", "milestones": [-1]}, "a list of integers"),
        ({"optimizer": "adm"}, "Nearest: adam"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'"),
        ({"milestones": [3]}, "no other schedule reads them"),
        ({"main_steps": 0}, "an integer, 1 or more, or None"),
        ({"main_steps": 3, "schedule": "cosine"}, "counts epochs, but the main stage is given 3 steps"),
        ({"graphs": 1}, "graphs is '1'"),
        ({"graphs": "on"}, "graphs is 'on'"),
        ({"tf32": "some"}, "tf32 is 'some'"),
        ({"device": 0}, "device is 0. Expected: a name"),
        ({"compile_mode": "fast"}, "compile_mode is 'fast'"),
        ({"lerning_rate": 1.0}, "Nearest: learning_rate"),
    ],
)
def test_an_illegal_value_is_refused(options, message):
    with pytest.raises(ConfigError) as error:
        Settings.of(options)
    assert message in str(error.value)


def test_what_has_no_effect_is_said():
    budgets = [Budget(3, "epochs", 1e-3, "adam")]
    assert Settings(shard=True, momentum=0.5, gamma=0.2).unused(budgets, 1) == [
        "shard has no effect: there is one process",
        "momentum has no effect: it is an option of sgd, but the stages use adam",
        "gamma has no effect: the schedule is constant, and only step reads it",
    ]
    told = Settings(shard=True, momentum=0.5, gamma=0.2, schedule="step", milestones=[1])
    assert told.unused([*budgets, Budget(3, "epochs", 1e-3, "sgd")], 2) == []
    assert Settings().unused(budgets, 1) == []
    rising = Settings(rise_steps=1000)
    assert rising.unused(budgets, 1, main_steps=20) == [
        "the learning rate rises over 1,000 steps, but the main stage has 20, where it ends at 2% of its value"
    ]
    assert rising.unused(budgets, 1, main_steps=1000) == rising.unused(budgets, 1) == []
