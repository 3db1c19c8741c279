"""Example inputs by their description: `3x32x32`, `pixel_values:3x224x224`, `input_ids:int64[0..30521]x128`, `mask:boolx128`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from indistill_fx.errors import ConfigError
from indistill_fx.loading.spec import LARGEST_INPUT, is_input_size

if TYPE_CHECKING:
    from torch import Tensor, nn

_WHOLE = ("int64", "int32", "int16", "int8", "uint8", "bool")
_REAL = ("float32", "float64", "float16", "bfloat16")
_FORM = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*):)?"
    rf"(?:(?P<dtype>{'|'.join((*_WHOLE, *_REAL))})(?:\[(?P<low>-?\d{{1,9}})\.\.(?P<high>-?\d{{1,9}})\])?(?:x|$))?"
    r"(?P<shape>\d{1,9}(?:x\d{1,9})*)?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class InputForm:
    """What one input of a model looks like.

    Attributes:
        name: in the forward's signature; empty where it goes by its place.
        dtype: as torch writes it.
        low: the lowest value of whole numbers.
        high: the highest one.
        shape: of one sample, without the batch.
    """

    name: str
    dtype: str
    low: int
    high: int
    shape: tuple[int, ...]


def parse_input(text: str, real: str = "float32") -> InputForm:
    """One input, as options give it: [NAME:][DTYPE[LOW..HIGH]x]SHAPE; `real`: the dtype where the text gives none.

    Raises:
        ConfigError: it has another form, or is too large.

    >>> parse_input("3x32x32").shape
    (3, 32, 32)
    >>> parse_input("input_ids:int64[0..99]x12")
    InputForm(name='input_ids', dtype='int64', low=0, high=99, shape=(12,))
    """
    name, colon, rest = text.strip().rpartition(":")
    found = _FORM.fullmatch(name + colon + rest.lower())
    dtype = (found["dtype"] or real) if found else ""
    shape = tuple(map(int, found["shape"].split("x"))) if found and found["shape"] else ()
    ranged = found is not None and found["low"] is not None
    low, high = (int(found["low"]), int(found["high"])) if found and ranged else (0, 1)
    fits = found is not None and (shape or found["dtype"]) and 0 not in shape and not text.strip().endswith("x")
    if not fits or low > high or (ranged and dtype in _REAL) or (dtype == "bool" and (low < 0 or high > 1)):
        hint = (
            "Write the shape of one sample, without the batch, as 3x224x224: channels, height, width. Several inputs are named: "
            "--input input_ids:int64[0..30521]x128 --input attention_mask:int64[1..1]x128."
        )
        raise ConfigError(f"{text!r} is not an input shape.", where="--input", got=text, expected="CxHxW", hint=hint)
    if shape and not is_input_size(shape):
        hint = f"At most {LARGEST_INPUT:,} elements are taken."
        raise ConfigError(f"An input of {text} would not fit in memory.", where="--input", got=text, hint=hint)
    return InputForm(found["name"] or "" if found else "", dtype, low, high, shape)


def example_inputs(texts: Sequence[str], real: str = "float32") -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
    """Example inputs as options describe them: random numbers that follow from a fixed seed, one sample.

    Args:
        texts: see `parse_input`.
        real: likewise.

    Returns:
        A tensor for one input without a name, a tuple for several, a dictionary where they have names.

    Raises:
        ConfigError: a form that is none, a name given twice, or names for some inputs only.
    """
    import torch

    forms = [parse_input(text, real) for text in texts]
    names = [form.name for form in forms]
    if any(names) and (not all(names) or len(set(names)) < len(names)):
        twice = next((name for name in names if names.count(name) > 1 and name), "")
        problem = f"the input {twice!r} twice" if twice else "names for some inputs only"
        hint = "Name every input once: --input input_ids:int64[0..99]x12 --input pixel_values:3x224x224."
        raise ConfigError(f"--input gives {problem}.", where="--input", got=list(texts), hint=hint)
    generator = torch.Generator().manual_seed(0)
    tensors = [_example(form, generator) for form in forms]
    if all(names):
        return dict(zip(names, tensors, strict=True))
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def describe_inputs(example: Any) -> list[str]:
    """Inputs as `example_inputs` reads them: the other way round.

    Args:
        example: a tensor, several in order, or by name, or a call; the first dimension of each is the batch. Whole numbers are said to lie
            between the least and the largest that are there.

    Returns:
        One text for each input; nothing for what has no such form.
    """
    from torch import Tensor

    from indistill_fx.system.call import Call

    if isinstance(example, Call):
        example = (
            dict(example.kwargs) if example.kwargs and not example.args else (*example.args, *example.kwargs.values())
        )
    entries = (
        example
        if isinstance(example, Mapping)
        else dict(enumerate([example] if isinstance(example, Tensor) else example))
    )
    texts = []
    for name, value in entries.items():
        kind = (
            str(value.dtype).removeprefix("torch.")
            if isinstance(value, Tensor) and value.ndim and value.numel()
            else ""
        )
        if kind not in (*_WHOLE, *_REAL):
            return []
        span = f"[{int(value.min())}..{int(value.max())}]" if kind in _WHOLE else ""
        head = f"{name}:" if isinstance(name, str) else ""
        texts.append(head + "x".join((kind + span, *map(str, value.shape[1:]))))
    try:
        for text in texts:
            parse_input(text)
    except ConfigError:  # a name or a number that the option does not accept
        return []
    return texts


def within_tables(example: Any, module: nn.Module) -> Any:
    """The example inputs; with zeros for whole numbers, if a look-up of the module is beyond one of its tables on them."""
    import torch
    from torch.utils._pytree import tree_leaves, tree_map

    from indistill_fx.batch import call_of
    from indistill_fx.graph.module_state import mode, untouched
    from indistill_fx.system.model_inputs import Inputs

    whole = [leaf for leaf in tree_leaves(example) if isinstance(leaf, torch.Tensor) and not leaf.is_floating_point()]
    if not whole:
        return example
    try:
        with untouched(module), mode(module, training=False), torch.no_grad():
            call_of(example, Inputs.of(module), where="The example")(module)
    except IndexError:
        return tree_map(lambda leaf: torch.zeros_like(leaf) if any(leaf is one for one in whole) else leaf, example)
    except Exception:  # whatever else its code raises is told where the inputs are used
        pass
    return example


def _example(form: InputForm, generator: object) -> Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, form.dtype)
    assert isinstance(generator, torch.Generator)
    if form.dtype in _REAL:
        return torch.randn(1, *form.shape, generator=generator).to(dtype)
    return torch.randint(form.low, form.high + 1, (1, *form.shape), generator=generator).to(dtype)
