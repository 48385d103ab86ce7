"""What the configuration may say of Globus."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hpc_bridge.section import Time


class Globus(BaseModel):
    """An identity at Globus: the confidential client of a beamline, or a person."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    client_id: UUID
    client_secret: Path | None = None
    """File of the confidential client's secret, which nobody else may read."""
    tokens: Path | None = None
    """File where `hpc-bridge login` keeps a person's tokens."""
    mapped_collections: tuple[UUID, ...] = ()
    """That want a consent to data_access: mapped ones of Globus Connect Server. A guest collection does not, nor one
    of high assurance."""
    mounted: dict[UUID, Path] = Field(default_factory=dict)
    """Where the root of a collection is seen from here: what arrives there is read again."""
    most_active: Annotated[int, Field(ge=1, le=3)] = 3
    """Tasks at once. The service carries out three per identity, and lets others wait."""
    timeout: Time = timedelta(seconds=15)
    """Of every request to the service."""
    poll: Time = timedelta(seconds=5)
    """Between looks at a task."""

    @model_validator(mode="after")
    def _is_somebody(self) -> "Globus":
        if (self.client_secret is None) == (self.tokens is None):
            raise ValueError("names neither or both of client_secret (of a beamline) and tokens (of a person)")
        return self
