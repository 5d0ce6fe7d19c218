"""Only the file that was allowed runs, only its very bytes, and only for names that a recipe gives a weight."""

from __future__ import annotations

import hashlib
import inspect
import sys
from pathlib import Path

import pytest

from gemma_grpo.reward.allowed_code import MAX_BYTES, MODULE, CodeFile, own_functions, read_code

BUILT_IN = ("length", "judge")
SOURCE = b"""
from pathlib import Path
import math as _math

LIMIT = 5

def brevity(completions, **columns):
    return [-float(len(turns[0]["content"]) > LIMIT) for turns in completions]

async def slow(completions): return [0.0]

def length(completions): return [0.0]

class NotAFunction:
    pass

def _private(completions): return [0.0]
"""


def write(folder: Path, data: bytes = SOURCE) -> Path:
    path = folder / "mine.py"
    path.write_bytes(data)
    return path


def test_the_functions_that_rewards_name_are_taken(tmp_path: Path) -> None:
    functions = own_functions(read_code(write(tmp_path)), ["brevity", "judge"], BUILT_IN)
    assert list(functions) == ["brevity"]
    assert functions["brevity"]([[{"content": "four"}], [{"content": "longer"}]]) == [0.0, -1.0]
    assert set(CodeFile(tmp_path / "mine.py", SOURCE).run()) == {"brevity", "slow", "length"}


def test_what_runs_is_what_was_read_and_hashed_whatever_the_file_says_later(tmp_path: Path) -> None:
    path = write(tmp_path)
    code = read_code(path)
    assert code.sha256 == hashlib.sha256(SOURCE).hexdigest()
    assert code.record == {"path": str(path), "sha256": code.sha256}
    path.write_bytes(b"raise SystemExit('the file was changed after it was shown')")
    function = code.run()["brevity"]
    assert function([[{"content": "longer"}]]) == [-1.0]
    path.unlink()
    assert code.run()["brevity"]([[{"content": "longer"}]]) == [-1.0]


def test_no_bytecode_is_written_and_a_planted_one_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    read_code(path).run()
    assert sorted(tmp_path.iterdir()) == [path]
    cache = tmp_path / "__pycache__"
    cache.mkdir()
    (cache / f"mine.{sys.implementation.cache_tag}.pyc").write_bytes(b"nonsense that no loader may look at")
    assert "brevity" in read_code(path).run()


def test_an_error_in_a_function_points_at_its_file_and_line(tmp_path: Path) -> None:
    functions = read_code(write(tmp_path, b"def f(x):\n    return 1 / 0\n")).run()
    assert functions["f"].__module__ == MODULE
    assert inspect.getsourcefile(functions["f"]) == str(tmp_path / "mine.py")
    with pytest.raises(ZeroDivisionError) as raised:
        functions["f"](0)
    assert (raised.traceback[-1].path, raised.traceback[-1].lineno) == (tmp_path / "mine.py", 1)


def test_an_encoding_that_the_file_names_is_read(tmp_path: Path) -> None:
    functions = read_code(write(tmp_path, "# coding: latin-1\ndef f(x):\n    return 'é'\n".encode("latin-1"))).run()
    assert functions["f"](0) == "é"


def test_a_file_whose_functions_no_reward_names_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = write(tmp_path, f"from pathlib import Path\nPath({str(canary)!r}).touch()\n".encode())
    with pytest.raises(ValueError, match=r"every reward of this recipe is built in \(length\), so .*mine.py was not run"):
        own_functions(read_code(path), ["length"], BUILT_IN)
    assert not canary.exists()


def test_a_name_that_is_nowhere_is_refused_with_both_lists(tmp_path: Path) -> None:
    words = r"reward 'brevty' is neither built in \(judge, length\) nor a function of .*mine.py \(brevity, length, slow\)"
    with pytest.raises(ValueError, match=words):
        own_functions(read_code(write(tmp_path)), ["brevty"], BUILT_IN)


@pytest.mark.parametrize("name", ["NotAFunction", "LIMIT", "Path", "_private", "_math", "os.system", "__builtins__"])
def test_only_the_files_own_functions_are_rewards(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is neither built in"):
        own_functions(read_code(write(tmp_path)), [name], BUILT_IN)


def test_a_name_that_is_built_in_and_in_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward .length. is built in and a function of .*mine\.py too"):
        own_functions(read_code(write(tmp_path)), ["brevity", "length"], BUILT_IN)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"def f(:\n", "SyntaxError"),
        (b"\xff\xfe not text", "SyntaxError"),
        (b"null \x00 byte", "SyntaxError|ValueError"),
        (b"import no_such_module_anywhere", "ModuleNotFoundError"),
        (b"1 / 0", "ZeroDivisionError"),
        (b"raise SystemExit(0)", "SystemExit"),
        (b"import sys; sys.exit()", "SystemExit"),
    ],
)
def test_a_file_that_does_not_run_to_its_end_is_an_error_and_leaves_no_module(tmp_path: Path, data: bytes, reason: str) -> None:
    sys.modules.pop(MODULE, None)
    with pytest.raises(ValueError, match=rf"mine.py cannot be run \(({reason}): .*Run it by itself and mend it"):
        own_functions(read_code(write(tmp_path, data)), ["f"], BUILT_IN)
    assert MODULE not in sys.modules


def test_a_file_that_is_none_or_too_large_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.py"):
        with pytest.raises(ValueError, match="is no file"):
            read_code(path)
    with pytest.raises(ValueError, match="is larger than 1000000 bytes"):
        read_code(write(tmp_path, b"#" * (MAX_BYTES + 1)))
