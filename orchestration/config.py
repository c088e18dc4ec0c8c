"""Settings of gates, registry and retraining, as written in params.yaml."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from runtime.settings import Settings


class GatesConfig(Settings):
    """What a challenger must reach on the evaluation set before it may become champion."""

    floors: dict[str, float] = Field(min_length=1, description="metric name -> lowest value that passes")
    regression_tolerance: NonNegativeFloat = Field(0.02, description="how far below the champion a metric may lie")
    tolerances: dict[str, NonNegativeFloat] = Field({}, description="metric name -> its own tolerance, in place of regression_tolerance")

    @model_validator(mode="after")
    def _tolerances_are_of_gates(self) -> Self:
        for name in self.tolerances:
            if name not in self.floors:
                raise ValueError(f"tolerances: names {name!r}, which has no floor; allowed: {sorted(self.floors)}")
        return self


class RegistryConfig(Settings):
    """The registered model in MLflow."""

    model_name: str = Field("deepgen", pattern="^[a-z0-9][a-z0-9_-]*$")
    experiment: str = "deepgen"
    require_approval: bool = Field(False, description="whether a person must approve a version before it may become champion")


class BudgetConfig(Settings):
    """What a run may take by its prediction; above it, it is refused before it starts. null is no limit."""

    max_hours: PositiveFloat | None = None
    max_gpu_hours: PositiveFloat | None = None
    max_cost: PositiveFloat | None = Field(None, description="in the currency of price_per_gpu_hour")
    gpu: Literal["a100", "h100", "h200"] = Field("h200", description="whose published speed predicts what was never measured here")
    rates: str | None = Field(
        None, min_length=1, description="JSON of measured rates and price_per_gpu_hour, as `python -m training estimate --rates` reads it"
    )


class RetrainConfig(Settings):
    """When the schedule and the sensor ask for a new run. Both are off until someone turns them on in the UI."""

    cron: str = "0 2 * * 1"
    min_new_samples: NonNegativeInt = 1000
    max_age_days: PositiveFloat = 30.0
    landing: str | None = Field(None, min_length=1, description="folder in which new data lands as PART/SNAPSHOT/ with a _SUCCESS marker")
