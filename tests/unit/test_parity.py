import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from indistill_fx.deploy import onnx_session, parity
from indistill_fx.errors import ConfigError

tensors = st.builds(lambda: torch.zeros(1))
keys = st.sampled_from(["a", "b", "a_1", "output", "output_1", "a.b"])
results = st.recursive(
    tensors | st.none() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(results)
def test_every_tensor_of_any_nesting_gets_a_name_of_its_own(result):
    leaves = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
    named = parity.named_outputs(result)
    assert [id(x) for x in named.values()] == [id(x) for x in leaves]


def test_outputs_are_named_after_their_keys():
    x = torch.zeros(1)
    assert list(parity.named_outputs(x)) == ["output"]
    assert list(parity.named_outputs((x, x))) == ["output_0", "output_1"]
    assert list(parity.named_outputs(({"layer3": x, "fc": x}, x))) == ["layer3", "fc", "output"]
    assert list(parity.named_outputs({"a": {"b": x}})) == ["a.b"]


@given(st.integers(1, 5), st.integers(0, 3))
def test_random_inputs_keep_kind_and_span(batch, seed):
    examples = (
        torch.randn(2, 3, 4) * 5 + 100,
        torch.tensor([[3, 9], [4, 4]]),
        torch.ones(2, 4, 4, 3, dtype=torch.uint8),
    )
    state = torch.get_rng_state()
    floats, tokens, pixels = onnx_session.random_inputs(examples, batch, seed=seed)
    assert floats.shape == (batch, 3, 4) and floats.dtype == torch.float32 and 50 < floats.mean() < 150
    assert tokens.shape == (batch, 2) and tokens.dtype == torch.int64 and tokens.min() >= 3 and tokens.max() <= 9
    assert pixels.shape == (batch, 4, 4, 3) and pixels.max() > 1
    assert torch.equal(torch.get_rng_state(), state)
    again = onnx_session.random_inputs(examples, batch, seed=seed)
    assert torch.equal(again[0], floats)


def test_random_inputs_of_a_fixed_batch_keep_first_axes_that_are_no_batch():
    inputs = onnx_session.random_inputs((torch.randn(3, 4), torch.randn(2, 3, 5)), 3)
    assert [tuple(x.shape) for x in inputs] == [(3, 4), (2, 3, 5)]
    picture, near = torch.randn(1, 4), torch.eye(5, dtype=torch.int64)  # of 0 and 1, as masks are
    assert [tuple(x.shape) for x in onnx_session.random_inputs((picture, near), 1)] == [(1, 4), (5, 5)]


def test_images_of_either_layout_are_tried_larger_and_not_square():
    floats, pixels, flat = onnx_session.random_inputs(
        (torch.randn(1, 3, 8, 8), torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.randn(1, 5)), 2, other_size=True
    )
    assert floats.shape == (2, 3, 40, 72) and pixels.shape == (2, 40, 72, 3) and flat.shape == (2, 5)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1.0, -1.0], [1.0, -1.5], (0.5, 2.0)),
        ([np.nan, 2.0], [np.nan, 2.0], (0.0, 2.0)),
        ([np.inf, 2.0], [np.inf, 2.0], (0.0, 2.0)),
        ([np.nan, 2.0], [0.0, 2.0], (np.inf, 2.0)),
        ([np.inf, 2.0], [9.0, 2.0], (np.inf, 2.0)),
        ([], [], (0.0, 0.0)),
    ],
)
def test_difference_and_range(ours, theirs, expected):
    assert parity._difference(np.array(ours, np.float32), np.array(theirs, np.float32)) == expected


@pytest.mark.parametrize("inputs", [(), (torch.tensor(1.0),), ("x",), (torch.zeros(2, 1), torch.zeros(3, 1))])
def test_inputs_that_have_no_common_batch_are_refused(inputs):
    with pytest.raises(ConfigError, match="batch"):
        onnx_session.as_inputs(inputs)


def test_rounding_tells_a_module_that_amplifies_it():
    class Cancels(torch.nn.Module):
        def forward(self, x):
            return (x * 1e7 + 1) - x * 1e7

    class Uncopyable(torch.nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert parity.rounding(torch.nn.Linear(3, 2), (x,)) < 1e-6
        assert parity.rounding(Cancels(), (x,)) > 1e-2
        assert parity.rounding(Uncopyable(3, 2), (x,)) is None


class OffAtThree:
    """A session of x -> 2x that is wrong for batches of three."""

    def get_inputs(self):
        return [type("Value", (), {"name": "x", "shape": ["batch", 5]})]

    def get_outputs(self):
        return [type("Value", (), {"name": "output"})]

    def get_modelmeta(self):
        return type("Meta", (), {"custom_metadata_map": {}})

    def run(self, names, fed):
        return [2 * fed["x"] + (len(fed["x"]) == 3)]


@pytest.mark.parametrize(("batch_sizes", "place"), [((1, 3, 4), 1), ((3, 1), 0), ((1, 4), None)])
def test_a_proof_holds_the_inputs_on_which_it_failed(batch_sizes, place):
    class Double(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    example = (torch.randn(2, 5, generator=torch.Generator().manual_seed(1)),)
    proof = parity.prove(OffAtThree(), Double(), example, batch_sizes=batch_sizes, tolerance=1e-3)
    assert len(proof.failures) == (place is not None)
    if place is None:
        assert proof.failed_on is None
    else:
        expected = onnx_session.random_inputs(example, 3, seed=place)
        assert len(proof.failed_on) == 1 and torch.equal(proof.failed_on[0], expected[0])
