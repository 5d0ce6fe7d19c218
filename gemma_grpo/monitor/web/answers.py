"""Answers as JSON that every browser reads, whatever a damaged or foreign log holds: no number without a size, no half of a character."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


def json_text(value: Any) -> str:
    """JSON in ASCII; a number that is infinite or none becomes null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:  # seldom: a log of ours holds no such number
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


class Json(JSONResponse):
    """An answer by json_text."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json_text(content).encode()
