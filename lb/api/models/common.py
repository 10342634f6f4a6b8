"""What the bodies and answers of all routes share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lb.model.state import MAX_WEIGHT

LARGEST = 2**53 - 1  # what every JSON parser reads exactly
Port = Annotated[int, Field(ge=0, le=65535)]
Weight = Annotated[int, Field(ge=0, le=MAX_WEIGHT)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @property
    def given(self) -> dict[str, Any]:
        """What the sender has said, without defaults."""
        return self.model_dump(exclude_unset=True, mode="json")


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class ProblemAnswer(Answer):
    """RFC 9457; `field` is the JSON Pointer of the value at fault in the body, or null."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None
