"""A stage of training as one module: a batch in, a scalar loss out.

Any loop can train it, and DDP, FSDP and torch.compile take it as they take any module. Its student half calls the user's own layers,
so that training the stage trains the user's student; its teacher half is frozen and runs without autograd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.batch import Parts, Sizes, split
from indistill_fx.curriculum import Budget
from indistill_fx.errors import TrainError
from indistill_fx.losses.base import MainLoss, Outputs
from indistill_fx.losses.positions import without_padding
from indistill_fx.losses.task import Language
from indistill_fx.passes.contract import PassRecord, signature_of
from indistill_fx.plan import Pair
from indistill_fx.stages import moving_teacher
from indistill_fx.stages.checks import check_inputs, check_labels, check_sizes
from indistill_fx.system.call import Call
from indistill_fx.system.model_inputs import Inputs


@dataclass(frozen=True, slots=True)
class StageReport:
    """What the passes did to each half of a stage, in the order in which they ran.

    Attributes:
        teacher: of the teacher's half; empty where the stage has none.
        student: of the student's half.
    """

    teacher: tuple[PassRecord, ...] = ()
    student: tuple[PassRecord, ...] = ()

    def __str__(self) -> str:
        """One line for everything that was done, and for everything that was skipped, with the reason."""
        lines = []
        for role, records in (("teacher", self.teacher), ("student", self.student)):
            for record in records:
                lines += [f"{role}, {record.name}: {entry}" for entry in record.done or ("nothing to do",)]
                lines += [f"{role}, {record.name}, skipped: {entry}" for entry in record.skipped]
        return "\n".join(lines)


class Stage(nn.Module):
    """One stage of training as a module: batch → loss. `compile_stages` makes it.

    Args:
        name: `layer1` (the student's tap) or `main`.
        student: graph from the inputs to (features by tap name, None).
        teacher: the same for the teacher, frozen; None if the loss does not need it.
        criterion: (student Outputs, teacher Outputs, labels) → scalar.
        pairs: the pairs whose features are compared; in `Outputs` they are keyed by the student's tap name.
        embedding: the pair of penultimate vectors, if the loss reads it.
        logits: the pair of main outputs, if the loss reads them: (teacher's tap or None, student's tap or None).
        budget: how long the curriculum trains it; None for the main stage.
        dtypes: the inputs' dtypes by name, if they are to be checked.
        macs: multiply-accumulates of one sample, forward: (teacher's half, student's half).
        report: what each pass did to the two halves, and what it skipped and why.
        fed: inputs of the student's graph that the teacher's features fill: input → the teacher's tap.
        fixed: the only input sizes for which the graphs are right, if there are such: the student's, then the teacher's.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent, DigitsTeacher
        >>> x, labels = torch.randn(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> stage = ifx.compile_stages(DigitsTeacher(), DigitsStudent(), example_inputs=x)[0]
        >>> stage.name, str(stage.budget), stage.teacher_taps
        ('blocks.0', '3 epochs, adam, learning rate 0.001', ('layer1',))
        >>> stage([x, labels]).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        name: str,
        student: fx.GraphModule,
        teacher: fx.GraphModule | None,
        criterion: nn.Module,
        pairs: Sequence[Pair] = (),
        embedding: Pair | None = None,
        logits: tuple[str | None, str | None] = (None, None),
        budget: Budget | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        macs: tuple[int, int] = (0, 0),
        report: StageReport | None = None,
        fed: Mapping[str, str] | None = None,
        fixed: Sequence[Mapping[str, Sizes]] = (),
    ):
        super().__init__()
        self.name, self.pairs, self.embedding, self.logits, self.budget = name, tuple(pairs), embedding, logits, budget
        self.student, self.teacher, self.criterion = student, teacher, criterion
        self.macs, self.report = macs, report or StageReport()
        self._fed = dict(fed or {})
        self._inputs = tuple(name for name in signature_of(student) if name not in self._fed)
        self._takes = [Inputs.of(half).without(self._fed) for half in (student, teacher) if half is not None]
        self._dtypes = tuple((dtypes or {}).get(name) for name in self._inputs)
        self._fixed = tuple(fixed)
        self._cached = self._looked = False

    def train(self, mode: bool = True) -> Stage:
        """Set the mode of the student's half and of the loss; the teacher stays in eval mode.

        Args:
            mode: True: training; False: evaluation.

        Returns:
            This stage.
        """
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(False)
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the model's inputs, in order."""
        return self._inputs

    @property
    def takes(self) -> Inputs:
        """What the student takes of a batch."""
        return self._takes[0]

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Names of the teacher's tensors that the loss reads."""
        if self.teacher is None:
            return ()
        taps = (self.embedding and self.embedding.teacher, self.logits[0], *(pair.teacher for pair in self.pairs))
        return tuple(dict.fromkeys(tap for tap in taps if tap))

    def without_teacher(self) -> Stage:
        """The same stage and student, but the teacher's features come in the batch (see `feature_cache`).

        Returns:
            A new stage.
        """
        new = Stage(
            name=self.name,
            student=self.student,
            teacher=None,
            criterion=self.criterion,
            pairs=self.pairs,
            embedding=self.embedding,
            logits=self.logits,
            budget=self.budget,
            macs=(0, self.macs[1]),
            report=StageReport(student=self.report.student),
            fed=self._fed,
            fixed=self._fixed[:1],
        )
        new._dtypes, new._cached = self._dtypes, self.teacher is not None
        return new

    def forward(self, batch: Any) -> Tensor:
        """The stage's loss.

        Args:
            batch: a tensor of inputs; a sequence of the models' inputs in order, then the labels, then the sample indices (the last
                two where the loss needs them); or entries by name, with `labels`, `indices` and, for a stage `without_teacher`,
                `teacher_features` (see `batch`). By name, teacher and student each get what they take.

        Returns:
            A scalar.

        Raises:
            ConfigError: the batch is none of these, an entry is not a tensor or of a wrong device or dtype, the labels or indices that
                the loss needs are missing, or the labels are not of the task (see `compile_stages`).
            TrainError: a stage without a teacher gets no features.
        """
        parts = split(batch, *self._takes, where=f"Stage `{self.name}`")
        check_inputs(parts, self._inputs, self._dtypes, self.student, stage=self.name)
        for role, call, sizes in zip(("student", "teacher"), parts.calls, self._fixed, strict=False):
            check_sizes(call, sizes, where=f"Stage `{self.name}`", role=role)
        teacher = Outputs(None, None, {}, parts.indices)
        known: Mapping[str, Tensor] = {}
        if self._cached:
            known = self._given(parts)
        elif self.teacher is not None:
            with torch.no_grad():
                known, _ = parts.calls[1](self.teacher)
        if known:
            teacher = self._outputs(known, 0, parts.indices)
        features, _ = parts.calls[0].plus({name: known[tap] for name, tap in self._fed.items()})(self.student)
        student = self._outputs(features, 1, parts.indices)
        self._check_labels(student.logits, parts.labels)
        labels = parts.labels if parts.labels is not None else self._without_padding(parts.calls[0], student.logits)
        loss: Tensor = self.criterion(student, teacher, labels)
        return loss

    def _without_padding(self, call: Call, logits: Tensor | None) -> Tensor | None:
        """For texts without labels: which of the student's tokens count, by its padding mask, as Hugging Face's models take it."""
        criterion = self.criterion
        plain = isinstance(criterion, MainLoss) and not (criterion.weight_labels or criterion.needs_labels)
        if logits is None or not plain or not isinstance(criterion.reads, Language):
            return None
        given = call.by_name(self.takes.names)
        mask = given.get("decoder_attention_mask" if "decoder_input_ids" in given else "attention_mask")
        return without_padding(mask) if mask is not None and mask.shape == logits.shape[:2] else None

    def _check_labels(self, logits: Tensor | None, labels: Tensor | None) -> None:
        """Look at the labels of every batch on a CPU; elsewhere, where that means to wait for the device, at those of the first."""
        task = getattr(self.criterion, "reads", None)
        if task is None or self._looked or logits is None or labels is None:
            return
        if torch.compiler.is_compiling() or moving_teacher.must_not_wait():
            return
        check_labels(task, logits.detach(), labels, whose=f"Stage `{self.name}`, task {task.name}")
        self._looked = labels.device.type != "cpu"

    def _given(self, parts: Parts) -> Mapping[str, Tensor]:
        if parts.features is None:
            raise TrainError(
                f"Stage `{self.name}` has no teacher, and the batch has no `teacher_features`.",
                where=self.name,
                expected="a dict with inputs, labels and teacher_features",
                hint="Let `FeatureStore.attach` make the batches, or train the stage that holds the teacher.",
            )
        return parts.features

    def _outputs(self, features: Mapping[str, Tensor], side: int, indices: Tensor | None) -> Outputs:
        logits, embedding = self.logits[side], self.embedding
        return Outputs(
            features[logits] if logits is not None else None,
            features[(embedding.teacher, embedding.student)[side]] if embedding is not None else None,
            {pair.student: features[(pair.teacher, pair.student)[side]] for pair in self.pairs},
            indices,
        )
