"""What every section of the settings is: frozen, complete, and closed to unknown keys."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A setting is wrong; the message names the file, the key and what to do."""


class Section(BaseModel):
    """Fields have no defaults: params.yaml holds every value, so that nothing is set where a user cannot see it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
