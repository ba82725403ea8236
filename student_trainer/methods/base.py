"""Interface of a distillation method.

Shape legend: B batch, C student channels, H W student grid, N teacher positions, P prefix tokens, D teacher channels,
K classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.format.manifest import SplitInfo
from feature_store.teacher import LaterBlocks
from student_trainer.methods.criterion import cross_entropy
from student_trainer.methods.precision import at_least_float32

Grid = tuple[int, int]
TaskLoss = Callable[[Tensor, Tensor], Tensor]
"""From student logits [B, K] and class indices [B] to the task loss, a scalar."""


class Needs(NamedTuple):
    """Parts of a batch that a method reads; other parts are not read or computed for it.

    Attributes:
        taps: Names of the teacher's taps, e.g. ``stage4``.
        logits: The teacher's logits; the student then has the teacher's classes.
        labels: Labels, for terms of the method's own beside the task loss; a run with unlabelled samples is refused.
        tail: The teacher's later blocks.
        some_labels: A label for some samples at least, for a method without any term that does without labels.
    """

    taps: tuple[str, ...] = ()
    logits: bool = False
    labels: bool = False
    tail: bool = False
    some_labels: bool = False


class StudentOutput(NamedTuple):
    """Output of one forward pass of the student.

    Attributes:
        maps: F^s of stages 3 and 4, each [B, C, H, W].
        logits: s [B, K], bitwise those of the timm model itself.
    """

    maps: tuple[Tensor, Tensor]
    logits: Tensor


@dataclass(frozen=True)
class StudentShape:
    """Sizes of a student.

    Attributes:
        dims: Channels (C3, C4) of its stages 3 and 4.
        grids: Their grids ((H3, W3), (H4, W4)).
        num_classes: K.
    """

    dims: tuple[int, int]
    grids: tuple[Grid, Grid]
    num_classes: int


@dataclass(frozen=True)
class TeacherShape:
    """Sizes of a teacher, and its later blocks.

    Attributes:
        split: Channels and grids of its final feature map and of the map its later blocks take.
        num_classes: Classes of its logits; 0 without a classifier.
        tail: Loads P, its later blocks, on the run's device.
    """

    split: SplitInfo
    num_classes: int
    tail: Callable[[], LaterBlocks]


class TeacherOutput(NamedTuple):
    """A teacher's features and logits for a batch, in float32.

    Attributes:
        taps: Features by tap name: ``stage4`` is F^t [B, N, D], ``stage3_prefix`` [B, P, D].
        logits: z [B, K]; None where the method does not need them.
        mixture: In a run with several teachers, set by SeveralTeachers: weight and logits of each that has a
            classifier; weights add up to 1.
    """

    taps: Mapping[str, Tensor] = {}
    logits: Tensor | None = None
    mixture: tuple[tuple[float, Tensor], ...] = ()

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """softmax(z / T) [B, K] in float32 or wider; of several teachers, the weighted mean of theirs.

        Raises:
            InputError: The batch carries no logits.
        """
        if self.logits is None:
            raise InputError("the batch carries no teacher logits; a method that reads them sets Needs(logits=True)")
        weighted = [
            weight * at_least_float32(logits)[0].div(temperature).softmax(dim=1)
            for weight, logits in self.mixture or ((1.0, self.logits),)
        ]
        return sum(weighted[1:], start=weighted[0])


class DistillBatch(NamedTuple):
    """A method's input beside the student's output.

    Attributes:
        images: Normalised views [B, 3, H, W], the student's input.
        labels: Class indices int64 [B]; NO_LABEL (-1) for samples without one, which the task loss leaves out.
        teacher: The teacher's output for the same views.
        others: In a run with several teachers: the second and later ones. SeveralTeachers calls a method for each with
            that teacher as ``teacher``, so no other method reads this.
    """

    images: Tensor
    labels: Tensor
    teacher: TeacherOutput
    others: tuple[TeacherOutput, ...] = ()


class Terms(NamedTuple):
    """Terms of a loss.

    Attributes:
        raw: Scalars by name, unweighted; ``task`` is the student's own.
        weights: The weight of each.
    """

    raw: dict[str, Tensor]
    weights: dict[str, float]

    @property
    def weighted(self) -> dict[str, Tensor]:
        """Weight times value, by name."""
        return {name: self.weights[name] * value for name, value in self.raw.items()}

    @property
    def total(self) -> Tensor:
        """The loss: the sum of the weighted terms."""
        first, *others = self.weighted.values()
        return sum(others, start=first)


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none."""


class Method(nn.Module):
    """A distillation method: everything that learns beside the student, and the loss.

    A custom method subclasses this, names its needs and computes its terms::

        class LogitMSE(Method):
            Config = LogitMSEConfig  # a frozen dataclass: options for --method-options and for Python
            needs = Needs(logits=True)

            def forward(self, student, batch):
                mse = F.mse_loss(student.logits, batch.teacher.logits)
                return Terms({"task": self.task(student.logits, batch.labels), "mse": mse}, {"task": 1.0, "mse": 0.5})

    Its modules (projectors...) are kept in ``last.pt`` and dropped on export.

    Attributes:
        Config: Frozen dataclass of the method's options; its ``__post_init__`` refuses values that cannot be used.
        requires_teacher: Whether a run without a teacher is refused.
        shared_terms: Names of terms that several teachers have in common; all others are computed for each.
        needs: Parts of a batch that it reads; of the class, or set by ``__init__`` where options or teacher decide.
        notes: Notes about the method for the user; shown when the run starts.
        config: The options.
        task: The task loss.
    """

    Config: ClassVar[type[Any]] = NoOptions
    requires_teacher: ClassVar[bool] = True
    shared_terms: ClassVar[frozenset[str]] = frozenset({"task"})
    needs: Needs = Needs()
    notes: tuple[str, ...] = ()

    def __init__(
        self, config: Any, student: StudentShape, teacher: TeacherShape | None, task: TaskLoss = cross_entropy
    ) -> None:
        """Build what the method learns.

        Args:
            config: Its options, an instance of ``Config``.
            student: Sizes of the student.
            teacher: Sizes of the teacher; None in a run without one.
            task: The task loss.

        Raises:
            InputError: Options that do not fit the student or the teacher, or a class that needs logits of a teacher
                without a classifier.
        """
        super().__init__()
        self.config, self.task = config, task
        if self.needs.logits and teacher is not None and not teacher.num_classes:
            raise InputError(
                f"the {type(self).__name__.lower()} method needs teacher logits, but the teacher has no classifier; "
                "choose --method scalekd or fd"
            )

    @property
    def needs_of_teachers(self) -> tuple[Needs, ...]:
        """Needs of each teacher; of one, ``needs``."""
        return (self.needs,)

    def forward(self, student: StudentOutput, batch: DistillBatch) -> Terms:
        """The terms of the loss for one batch.

        Args:
            student: Maps and logits of the student for ``batch.images``.
            batch: Labels, and what the method needs of the teacher.
        """
        raise NotImplementedError
