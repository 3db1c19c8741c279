"""Values that are checked when they are made, and never change; what is wrong with one is said in one sentence."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from indistill_fx.errors import ConfigError, nearest


class Value(BaseModel):
    """Base of the values that users make, and that our files hold.

    Raises:
        ConfigError: a field is absent, unknown, or of another type or range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise _refusal(type(self), error) from error

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # pydantic makes values inside others without it, as without ours


def fault(error: ValidationError) -> tuple[str, str]:
    """Where the first fault is, such as `pairs.0.score`, and what it is."""
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    return ".".join(map(str, first["loc"])), reason


def _refusal(kind: type[BaseModel], error: ValidationError) -> ConfigError:
    first, name = error.errors()[0], kind.__name__
    place, reason = fault(error)
    hint = f"See help(ifx.{name})."
    if first["type"] == "extra_forbidden":
        text, hint = f"{name} has no field `{place}`.", nearest(place, kind.model_fields)
    elif first["type"] == "missing":
        absent = [f"`{'.'.join(map(str, entry['loc']))}`" for entry in error.errors() if entry["type"] == "missing"]
        text = f"{name} needs {', '.join(absent)}."
    elif place:
        text = f"{name}: `{place}` is {first['input']!r:.60}, but {reason}."
    else:
        text = f"{name}: {reason}."
    return ConfigError(text, where=place or name, got=first.get("input"), hint=hint)
