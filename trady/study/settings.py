"""The settings of the runs of a study."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trady.errors import StateError, TrainingError
from trady.records.versioned import Format

FORMAT = Format("trady-study", "study", StateError, "record it again")


@dataclass(frozen=True)
class StudySettings:
    """All but the data sets and seeds, which may be added to a study later.

    Attributes:
        model: Its name.
        epochs: Passes over the training data.
        batch_size: Examples a step.
        lr: Rate at the end of the warm-up.
        image_size: Height and width of the images; ``None`` is the model's own.
        limit: Maximum number of images to train and to evaluate on; ``None`` is all.
        budget: As text; ``None`` trains every weight.
        policy: Name of the policy inside the budget.
        every: One step in this many is recorded.
        noise_batches: Batches at the beginning of each epoch that the gradient noise is taken from.
    """

    model: str
    epochs: int
    batch_size: int = 32
    lr: float = 0.05
    image_size: int | None = None
    limit: int | None = None
    budget: str | None = None
    policy: str = "trady"
    every: int = 1
    noise_batches: int = 8

    def __post_init__(self) -> None:
        minimum = {"epochs": 1, "batch_size": 1, "every": 1, "noise_batches": 2}
        for name, smallest in minimum.items():
            if getattr(self, name) < smallest:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be at least {smallest}")

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**FORMAT.header(), **asdict(self)}

    @classmethod
    def from_json(cls, data: Any, where: str) -> StudySettings:
        """Read what :meth:`to_json` returned.

        Raises:
            StateError: It is something else, or of another version.
        """
        with FORMAT.named(where):
            return FORMAT.read(cls, data)

    def check_same(self, there: StudySettings, where: str) -> None:
        """Refuse to add runs to a study with other settings.

        Raises:
            StateError: The message says what differs.
        """
        mine, other = asdict(self), asdict(there)
        differences = [f"{key} {other[key]!r} there and {mine[key]!r} here" for key in mine if mine[key] != other[key]]
        if differences:
            raise StateError(
                f"{where} holds a study with other settings: {'; '.join(differences)}. Name another folder by --out, "
                "or type the settings that it has"
            )
