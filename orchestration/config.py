"""Settings of gates, registry and retraining, as written in params.yaml."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from runtime.settings import Settings


class GatesConfig(Settings):
    """What a challenger must reach on the evaluation set before it may become champion."""

    floors: dict[str, float] = Field(description="metric name -> lowest value that passes")
    regression_tolerance: NonNegativeFloat = Field(0.02, description="how far below the champion a metric may lie")


class RegistryConfig(Settings):
    """The registered model in MLflow."""

    model_name: str = Field("deepgen", pattern="^[a-z0-9][a-z0-9_-]*$")
    experiment: str = "deepgen"


class RetrainConfig(Settings):
    """When the schedule and the sensor ask for a new run. Both are off until someone turns them on in the UI."""

    cron: str = "0 2 * * 1"
    min_new_samples: NonNegativeInt = 1000
    max_age_days: PositiveFloat = 30.0
