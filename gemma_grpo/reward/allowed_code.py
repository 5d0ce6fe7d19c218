"""Reward functions from a file that the user allowed by name: the only code that a recipe's words can lead to.

The bytes whose hash was shown are the bytes that run: read once, compiled from memory, no bytecode file written or read. Owns that file
and which of its functions are taken; asking the user is cli/allowing.py's, calling the functions functions.py's. What the file imports
is its author's, and is not hashed.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.abc import InspectLoader
from importlib.util import decode_source, module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType
from typing import Any

MAX_BYTES = 1_000_000
MODULE = "gemma_grpo_allowed_code"
"""Its name in sys.modules and in traces."""


@dataclass(frozen=True)
class CodeFile:
    """A file of code as it was read; nothing of it has run."""

    path: Path
    data: bytes

    @property
    def sha256(self) -> str:
        """Of the bytes that `run` executes."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def record(self) -> dict[str, str]:
        """What run.json keeps of it."""
        return {"path": str(self.path), "sha256": self.sha256}

    def run(self) -> dict[str, Callable[..., Any]]:
        """Execute the bytes; the functions they define, by name. Raises ValueError when they cannot be executed to their end."""
        spec = spec_from_loader(MODULE, _BytesLoader(self), origin=str(self.path), is_package=False)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        module.__file__ = str(self.path)
        sys.modules[MODULE] = module  # dataclasses and others look their own module up there
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[MODULE]
            raise ValueError(f"{self.path} cannot be run ({type(error).__name__}: {error}). Run it by itself and mend it.") from error
        named = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        return {name: value for name, value in named.items() if inspect.isfunction(value) and value.__module__ == MODULE}


class _BytesLoader(InspectLoader):
    """Compiles the bytes in memory; importlib's own loader of files would read the file a second time, and write a .pyc."""

    def __init__(self, code: CodeFile) -> None:
        self.code = code

    def get_source(self, fullname: str) -> str:
        return decode_source(self.code.data)

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.code.data, str(self.code.path))


def read_code(path: Path) -> CodeFile:
    """The file's bytes, read once. Raises ValueError when it is not a file of at most MAX_BYTES."""
    if not path.is_file():
        raise ValueError(f"{path} is no file. Give --allow-code a Python file that defines the reward functions.")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES} bytes; reward functions are a page of Python. Is this the right file?")
    return CodeFile(path.absolute(), data)


def own_functions(code: CodeFile, names: Collection[str], built_in: Collection[str]) -> Mapping[str, Callable[..., Any]]:
    """The functions of the file that a recipe's reward `names` mean. The file is not run when they mean none.

    Raises ValueError for a name that is neither built in nor in the file, or that is both.
    """
    wanted = [name for name in names if name not in built_in]
    if not wanted:
        raise ValueError(
            f"every reward of this recipe is built in ({', '.join(names)}), so {code.path} was not run. "
            "Leave --allow-code out, or name one of its functions in `reward`."
        )
    functions = code.run()
    for name in names:
        if name in functions and name in built_in:
            raise ValueError(f"reward {name!r} is built in and a function of {code.path} too. Give the function another name.")
    missing = [name for name in wanted if name not in functions]
    if missing:
        raise ValueError(
            f"reward {missing[0]!r} is neither built in ({', '.join(sorted(built_in))}) nor a function of {code.path} "
            f"({', '.join(sorted(functions)) or 'it defines none'}). Mend the name, or define the function there."
        )
    return {name: functions[name] for name in wanted}
