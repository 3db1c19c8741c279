"""A student that ends in its teacher's own classifier, fed through a projector; the loss `simkd` trains it.

Rules, in order:
  1. The student is cut at its layer of the plan's last pair, the teacher after its layer of that pair.
  2. A projector brings the student's feature to the teacher's width and, where its map is larger, to the teacher's size.
  3. What the teacher computes after that feature is the classifier: frozen, and in eval mode for good.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.errors import ConfigError
from indistill_fx.graph.edit import copy_graph, output_node, sweep
from indistill_fx.graph.module_state import device_of, evaluating
from indistill_fx.graph.ops import op_name
from indistill_fx.passes.align import ReusedAfter, align
from indistill_fx.passes.capture.trace import as_traced
from indistill_fx.passes.extract.fold import fold
from indistill_fx.plan import AlignmentPlan, Pair
from indistill_fx.traced import NodeFacts, TracedModel

_NOT_NEGATIVE = frozenset({"relu", "relu6"})
_LAYERS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Linear, nn.BatchNorm1d),
    (nn.Conv1d, nn.BatchNorm1d),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv3d, nn.BatchNorm3d),
)
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


class FrozenClassifier(nn.Module):
    """Layers of a teacher that are part of a student, and stay as they are.

    Args:
        graph_module: from `fold`: without gradients, in eval mode.
    """

    def __init__(self, graph_module: fx.GraphModule):
        super().__init__()
        self.layers = graph_module
        self.train(False)

    def train(self, mode: bool = True) -> FrozenClassifier:
        """Stay in eval mode whatever `mode` is: batch norms keep the teacher's statistics."""
        return super().train(False)

    def forward(self, feature: Tensor) -> Tensor:
        """The logits that follow from a feature of the teacher's form."""
        logits: Tensor = self.layers(feature)
        return logits


def reuse_classifier(
    teacher: nn.Module | TracedModel,
    student: nn.Module | TracedModel,
    plan: AlignmentPlan | None = None,
    *,
    example_inputs: Any = None,
    factor: int = 2,
) -> fx.GraphModule:
    """Make a student that computes its teacher's last feature, and takes its logits from the teacher's own classifier.

    Train it with `main="simkd"`. What the teacher computes after its layer of the plan's last pair is the classifier: choose
    another pair in the plan to reuse more of the teacher, or less.

    Args:
        teacher: traced, or a plain module with `example_inputs`. It is not changed.
        student: likewise. Its own layers are in the new student; those after the last pair are left out.
        plan: the pairs; None: made by `align`.
        example_inputs: for plain modules; the first dimension is the batch.
        factor: the teacher's width divided by the width inside the projector.

    Returns:
        A module from the student's inputs to the teacher's logits: `student`, then `projector`, then `classifier`.

    Raises:
        ConfigError: the last pair has no features (batch, channels, *space), or the teacher's layers after it need more than its
            feature, or one of another size.

    Source:
        Chen, Mei, Zhang, Wang, Feng, Chen, "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, arXiv:2203.14001;
        the projector is the authors': 1x1, 3x3 and 1x1 convolutions with batch norm and ReLU. Deviations: a linear layer for
        vectors; the last ReLU only if the teacher's feature comes out of one; layers before the classifier are reused as the
        plan says.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent, DigitsTeacher
        >>> student = ifx.reuse_classifier(DigitsTeacher(), DigitsStudent(), example_inputs=torch.randn(2, 1, 8, 8))
        >>> [name for name, part in student.named_children()], student(torch.randn(4, 1, 8, 8)).shape
        (['student', 'projector', 'classifier'], torch.Size([4, 10]))
    """
    traced_teacher, traced_student = (
        as_traced(teacher, example_inputs, role="teacher"),
        as_traced(student, example_inputs, role="student"),
    )
    plan = align(traced_teacher, traced_student) if plan is None else plan
    plan.check(traced_teacher, traced_student)
    if not plan.pairs:
        raise ConfigError(
            "The plan has no pairs, and the teacher's classifier is what follows its layer of the last one.",
            where="plan",
            hint="Name a pair: align(…, fixed=[(TEACHER_LAYER, STUDENT_LAYER)]).",
        )
    pair = plan.pairs[-1]
    root = nn.Module()
    _require_channels(traced_teacher.facts_of(pair.teacher), traced_student.facts_of(pair.student), pair)
    root.student = _up_to(traced_student, pair.student)
    root.projector = make_projector(pair, factor, relu=op_name(traced_teacher.node(pair.teacher)) in _NOT_NEGATIVE)
    root.classifier = FrozenClassifier(_after(traced_teacher, pair.teacher))
    root.to(device_of(root.student))
    graph = fx.Graph()
    names = [str(node.target) for node in _placeholders(root.student)]
    inputs: dict[str, Any] = {name: graph.placeholder(name) for name in names}
    feature = graph.call_module("student", (), inputs)
    graph.output(graph.call_module("classifier", (graph.call_module("projector", (feature,)),)))
    made = fx.GraphModule(root, graph, class_name="ReusedClassifier")
    _check(made, traced_student, traced_teacher, pair)
    made.meta["reuses"] = ReusedAfter(pair.teacher, pair.teacher_shape[1:])
    return made.train(traced_student.module.training)


def make_projector(pair: Pair, factor: int, *, relu: bool) -> nn.Sequential:
    """From the student's feature of a pair to one of the teacher's form.

    Args:
        pair: of maps or vectors (batch, channels, *space).
        factor: the teacher's width divided by the width in between.
        relu: whether the teacher's feature is never negative.
    """
    student_shape, teacher_shape = pair.student_shape, pair.teacher_shape
    space = len(teacher_shape) - 2
    layer, norm = _LAYERS[space]
    width = max(teacher_shape[1] // factor, 1)
    layers: list[nn.Module] = []
    if any(n > m for n, m in zip(student_shape[2:], teacher_shape[2:], strict=True)):
        layers.append(_POOLS[space - 1](teacher_shape[2:]))
    for before, after, side in ((student_shape[1], width, 1), (width, width, 3), (width, teacher_shape[1], 1)):
        size: dict[str, Any] = {"kernel_size": side, "padding": side // 2} if space else {}
        layers += [layer(before, after, bias=False, **size), norm(after), nn.ReLU()]
    return nn.Sequential(*(layers if relu else layers[:-1]))


def require_same_classifier(teacher: TracedModel, student: TracedModel) -> None:
    """Refuse a student of `reuse_classifier` whose classifier is another teacher's, or the same one's with other weights.

    Raises:
        ConfigError: they differ.
    """
    reused = getattr(student.module, "meta", {}).get("reuses")
    if not isinstance(reused, ReusedAfter):
        return  # frozen by the user, who knows what it is
    if reused.tap in teacher.taps:
        wanted = _after(teacher, reused.tap).state_dict()
        found = student.module.get_submodule("classifier.layers").state_dict()
        same = wanted.keys() == found.keys() and all(
            value.shape == found[name].shape and torch.equal(value.to(found[name]), found[name])
            for name, value in wanted.items()
        )
        if same:
            return
    raise ConfigError(
        f"The student reuses the classifier of another teacher: its layers after `{reused.tap}` are not this teacher's.",
        where="student",
        got=reused.tap,
        expected="the classifier of the teacher that it learns from, with the same weights",
        hint="Give reuse_classifier the teacher with its trained weights, such as indistill_fx.load(SPEC).",
    )


def _require_channels(teacher_facts: NodeFacts, student_facts: NodeFacts, pair: Pair) -> None:
    fit = all(facts.channel_axis == 1 and facts.kind in ("map", "vector") for facts in (teacher_facts, student_facts))
    if not fit or len(teacher_facts.shape) != len(student_facts.shape) or len(student_facts.shape) - 2 >= len(_LAYERS):
        raise ConfigError(
            f"The teacher's classifier cannot be reused after `{pair.teacher}` ({teacher_facts.kind} {teacher_facts.shape}), "
            f"paired with the student's `{pair.student}` ({student_facts.kind} {student_facts.shape}).",
            where=pair.teacher,
            got=student_facts.shape,
            expected="two maps or two vectors (batch, channels, *space)",
            hint="Choose a last pair whose features are compatible; for a transformer, the vectors that its classifier reads.",
        )


def _up_to(traced: TracedModel, tap: str) -> fx.GraphModule:
    """The graph up to a tap, which returns the tap's tensor."""
    name = traced.node(tap).name
    new, nodes = copy_graph(traced.graph_module)
    output_node(new.graph).args = (nodes[name],)
    return sweep(new)


def _after(traced: TracedModel, tap: str) -> fx.GraphModule:
    """The graph from a tap to the logits, folded and frozen."""
    new, nodes = copy_graph(traced.graph_module)
    node = nodes[traced.node(tap).name]
    with new.graph.inserting_before(next(iter(new.graph.nodes))):
        feature = new.graph.placeholder("feature")
    node.replace_all_uses_with(feature)
    output_node(new.graph).args = (nodes[traced.logits],)
    sweep(new)
    for other in _placeholders(new):
        if other is not feature and other.users:
            raise ConfigError(
                f"The teacher's layers after `{tap}` read its input `{other.target}` too, past `{tap}`, so they cannot be reused.",
                where=tap,
                hint="Let the plan's last pair be a layer through which everything goes.",
            )
        if other is not feature:
            new.graph.erase_node(other)
    if not feature.users:
        raise ConfigError(
            f"No layer of the teacher follows `{tap}`, so there is no classifier to reuse.",
            where=tap,
            hint="Let the plan's last pair be a layer before the classifier.",
        )
    new.recompile()
    return fold(new).value


def _placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


def _check(made: fx.GraphModule, student: TracedModel, teacher: TracedModel, pair: Pair) -> None:
    expected = teacher.facts[teacher.logits].shape[1:]
    with evaluating(made), torch.no_grad():
        try:
            found = tuple(made(*student.example_values).shape[1:])
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"The teacher's layers after `{pair.teacher}` do not take a feature of the student's size "
                f"{pair.student_shape[2:]}: {' '.join(str(error).split())[:200]}",
                where=pair.teacher,
                got=pair.student_shape,
                expected=pair.teacher_shape,
                hint="Pair the teacher's layer with one of the student's whose map is at least as large.",
            ) from error
    if found != expected:
        raise ConfigError(
            f"From a feature of the student's size the teacher's classifier makes {found}, not {expected}.",
            where=pair.teacher,
            got=found,
            expected=expected,
            hint="Pair the teacher's layer with one of the student's whose map is at least as large.",
        )
