"""The base of every settings model: frozen, strict about names, floats finite."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A section of params.yaml. An unknown key or an impossible value is an error, never a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
