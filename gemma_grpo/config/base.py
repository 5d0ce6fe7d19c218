"""What every stage's settings are made of: kinds of numbers, and a frozen model that knows no other keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
TOO_MANY = 10**18
"""No whole number here reaches it: recipes are read with up to 18 digits, and nothing counts as far."""
Count = Annotated[int, Field(ge=1, lt=TOO_MANY)]
Whole = Annotated[int, Field(ge=0, lt=TOO_MANY)]


class Stage(BaseModel):
    """Base of every stage's settings."""

    # hide_input_in_errors: pydantic's own text would quote a secret that was given by mistake
    # allow_inf_nan: no setting means anything without a size, and a recipe writes .inf as a text that it reads back as a tag
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), hide_input_in_errors=True, allow_inf_nan=False
    )
