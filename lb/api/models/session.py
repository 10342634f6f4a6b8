"""Bodies and answers of lb.api.page_session."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lb.api.models.common import Answer, Body


class CodeBody(Body):
    code: Annotated[str, Field(min_length=1, max_length=100)]


class CodeAnswer(Answer):
    code: str
    expires_in_s: int


class SessionAnswer(Answer):
    token: str
    expires_in_s: int
