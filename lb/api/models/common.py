"""What the bodies and answers of all routes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lb.errors import InvalidInput
from lb.formats.problems import Pointer, Problem, of_error
from lb.formats.problems import pointer as to_pointer
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
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


B = TypeVar("B", bound=Body)


def checked(model: type[B], document: object, pointer: Pointer) -> B:
    """A part of a body that pydantic has left as it is (SkipValidation), checked by itself. Raises Problem."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise invalid(str(first["msg"]), (*pointer.steps, *first["loc"])) from None


def invalid(message: str, steps: Sequence[str | int]) -> Problem:
    named = ".".join(map(str, steps)) or "body"
    return of_error(InvalidInput(f"{named}: {message}"), field=to_pointer(steps))


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class ProblemAnswer(Answer):
    """RFC 9457; `field` is the JSON Pointer of the value at fault in the body, or null."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None
