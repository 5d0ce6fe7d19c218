"""How many prompts and completions a rollout holds at a time: decided here for the engine, and for the plan made before it exists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """What is held at a time: so many prompts of up to `width` tokens, so many rows of up to `length` own ones."""

    prompts: int
    width: int
    rows: int
    length: int

    @classmethod
    def of(cls, prompts: int, width: int, group: int, length: int, kv_tokens: int | None) -> Room:
        """The largest number of whole groups within kv_tokens, None for no limit; below one group as many completions of one, at least
        one; slots for waiting prompts with what is left. `width` is the longest prompt's tokens, `length` a completion's at most."""
        whole = width + group * length
        if kv_tokens is None or prompts * whole <= kv_tokens:
            return cls(prompts, width, prompts * group, length)
        groups, left = divmod(kv_tokens, whole)
        if groups == 0:
            return cls(1, width, min(group, max(1, (kv_tokens - width) // length)), length)
        return cls(min(prompts, groups + left // width), width, groups * group, length)

    @property
    def tokens(self) -> int:
        """Of keys and values in a global layer; a sliding one keeps what its window reaches."""
        return self.prompts * self.width + self.rows * self.length
