"""What a matrix file may hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from trady.compare.names import Names, Surroundings
from trady.compare.training import Training

#: Policies whose one cell serves for every budget.
WITHOUT_BUDGET = ("head", "full")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _by_themselves(value: object) -> object:
    """Turn a list of sources into a table in which each is its own name."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return {item: item for item in value}
    return value


def _for_all_models(value: object, info: ValidationInfo) -> object:
    """Turn one amount into a table with the same amount for every model."""
    if isinstance(value, str) and isinstance(info.context, Surroundings):
        return dict.fromkeys(info.context.declared["model"], value)
    return value


Amounts = Annotated[dict[Names.DeclaredModel, Names.Budget], BeforeValidator(_for_all_models)]


class Override(Training):
    """One ``[[override]]``: settings for the cells that it names; a later one wins.

    Attributes:
        model: Names of models; all where it is not given.
        dataset: Names of data sets.
        budget: Names of budgets.
        policy: Policies.
        amount: Another amount than the budget's, for a policy whose selection cannot be made smaller.
    """

    model: Annotated[list[Names.DeclaredModel], BeforeValidator(_as_list)] | None = None
    dataset: Annotated[list[Names.DeclaredDataset], BeforeValidator(_as_list)] | None = None
    budget: Annotated[list[Names.DeclaredBudget], BeforeValidator(_as_list)] | None = None
    policy: Annotated[list[Names.DeclaredPolicy], BeforeValidator(_as_list)] | None = None
    amount: Names.Budget | None = None

    def matches(self, model: str, dataset: str, budget: str | None, policy: str) -> bool:
        """Return whether a cell is among those it names."""
        wanted = ((self.model, model), (self.dataset, dataset), (self.budget, budget), (self.policy, policy))
        return all(names is None or name in names for names, name in wanted)


class Matrix(BaseModel):
    """The content of a matrix file.

    Attributes:
        models: Sources by name, as ``trady finetune`` takes them; a list makes each source its own name.
        datasets: The same for data sets. Paths start at the file's folder; ``${NAME}`` is read from the environment.
        budgets: Amounts by name: one for all models, or one by model.
        policies: Names of policies. ``head`` and ``full`` take no budget and are run once for all budgets.
        seeds: Seeds of everything random.
        training: Settings of every cell.
        override: Settings of some cells.
        imports: Modules to import first, e.g. one that registers policies.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    models: Annotated[dict[str, Names.Model], BeforeValidator(_by_themselves)] = Field(min_length=1)
    datasets: Annotated[dict[str, Names.Dataset], BeforeValidator(_by_themselves)] = Field(min_length=1)
    budgets: Annotated[dict[str, Amounts], BeforeValidator(_by_themselves)] = Field(default_factory=dict)
    policies: list[Names.Policy] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(default=[0], min_length=1)
    training: Training = Training()
    override: list[Override] = []
    imports: list[str] = []
