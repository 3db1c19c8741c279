"""What a student is made from: the teacher, traced so that it keeps, where possible, what its code does in train mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import fx, nn

from indistill_fx.errors import FrontendError
from indistill_fx.graph.computed_weights import is_computed, left_behind, write_out_weights
from indistill_fx.graph.edit import copy_graph, own_module, sweep
from indistill_fx.graph.ops import attribute, op_name, package_of
from indistill_fx.passes.capture.torch_functions import before_own_gradients
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.channels.call import constant_of, read_call
from indistill_fx.passes.pruning.shrink import Analysis, analyse
from indistill_fx.traced import TracedModel


def in_both_modes(
    teacher: TracedModel, logits: str | int | None = None, say: Callable[[str], None] = lambda text: None
) -> TracedModel:
    """The teacher traced as a student is, so that what its code does by `self.training` stays in what is made of it.

    Rules, in order:
      1. Weights that are recomputed at every call (weight norm, spectral norm, masks, standardised weights) become parameters of their
         present value.
      2. Where the two modes cannot be brought together, or where train mode keeps work from going that eval mode lets go, it is the teacher
         as it was traced: in eval mode.
      3. Where rule 2 loses a gradient that a function of the teacher's code defines itself, a line says so.

    Args:
        teacher: as it was traced.
        logits: key or index of the main output.
        say: called with a line where one of the rules holds.
    """
    module, plain = teacher.module, _with_plain_weights(teacher)
    computed = any(map(is_computed, module.modules()))
    if computed:
        module = copy.deepcopy(module, left_behind(module))
        write_out_weights(module)
    if computed or plain is not teacher:
        say(
            "Weights that the teacher recomputes at every call (weight norm, spectral norm, masks, standardised weights) become plain"
            " parameters of the student."
        )
    teacher = plain
    functions: list[type] = []
    try:
        with before_own_gradients(functions.append):
            found = _with_plain_weights(trace(module, teacher.example, role="student", logits=logits))
    except FrontendError:
        why = "the teacher's code for train mode cannot be traced"
    else:
        apart = "the teacher's train mode and eval mode do not fit into one graph"
        why = apart if found.report.lacks_eval_mode else ""
        if not why and _fixed_macs(analyse(found)) <= _fixed_macs(analyse(teacher)):
            return found
        why = why or "operations that it only does in train mode would keep channels from being removed"
    say(f"In train mode, too, the student computes what the teacher computes in eval mode, because {why}.")
    own = dict.fromkeys(f"`{f.__qualname__}`" for f in functions if package_of(f) != "torch")
    if own:
        say(
            f"The gradients that {', '.join(own)} define{'s' * (len(own) == 1)} are not in the student: where what they compute has no"
            " gradient, such as rounding or a threshold, the layers before learn nothing."
        )
    return teacher


def _with_plain_weights(model: TracedModel) -> TracedModel:
    """The model with parameters in place of the weights that its code standardises (`F.batch_norm` of a weight): rule 1.

    Their statistics would be those of fewer channels, so none could be removed.
    """
    new, nodes = copy_graph(model.graph_module)
    found = False
    for node in model.graph_module.graph.nodes:
        weight = read_call(node, model.facts).arguments.get("weight") if op_name(node) in _WEIGHTED else None
        if not isinstance(weight, fx.Node) or (source := _standardized(weight)) is None:
            continue
        value = constant_of(weight, model.facts)
        if value is None or value.shape != model.facts[source.name].shape:
            continue
        nodes[node.name].replace_input_with(nodes[weight.name], nodes[source.name])
        path, _, name = str(source.target).rpartition(".")
        trained = attribute(model.graph_module, str(source.target)).requires_grad
        own_module(new, path)._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=trained)
        found = True
    if not found:
        return model
    names = {node.name for node in sweep(new).graph.nodes}
    return replace(model, graph_module=new, facts={name: facts for name, facts in model.facts.items() if name in names})


_WEIGHTED = frozenset(("conv", "conv_transpose", "linear"))


def _standardized(weight: fx.Node) -> fx.Node | None:
    """The parameter from which a weight is computed by a batch norm, and that nothing else reads; else None."""
    needed, pending = {weight}, [weight]
    while pending:
        new = set(pending.pop().all_input_nodes) - needed
        needed |= new
        pending += new
    norms = [node for node in needed if op_name(node) == "batch_norm"]
    source = norms[0].all_input_nodes[0] if len(norms) == 1 else weight
    while len(source.all_input_nodes) == 1:
        source = source.all_input_nodes[0]
    return source if len(norms) == 1 and source.op == "get_attr" and needed.issuperset(source.users) else None


def train_as(teacher: TracedModel, student: TracedModel) -> None:
    """Set which parameters of a student, made of a teacher, are trained.

    Rules, in order:
      1. All, where the teacher trains none: it was frozen to be a teacher.
      2. What the teacher does not train stays as it is if nothing of it was removed: fixed filters, a fixed scale.
      3. All others: the rest of a layer has to make up for what was removed.
    """
    given = dict(teacher.graph_module.named_parameters())
    some = any(parameter.requires_grad for parameter in given.values())
    for name, parameter in student.graph_module.named_parameters():
        kept = name in given and not given[name].requires_grad and given[name].shape == parameter.shape
        parameter.requires_grad_(parameter.is_floating_point() and not (some and kept))


def _fixed_macs(known: Analysis) -> int:
    """Multiply-accumulates of the layers that cannot be reduced."""
    stay = np.zeros(len(known.classes.scores), dtype=bool)
    stay[[*known.classes.reasons]] = True
    return known.cost.macs(stay)
