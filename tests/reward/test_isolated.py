"""A call in a process of its own: it ends in time with all it started, says what it printed up to a limit, and leaves nothing behind."""

from __future__ import annotations

import gc
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_grpo.reward.isolated import OUTPUT_LIMIT, LateError, NoAnswerError, call_isolated
from gemma_grpo.stopping import Stopped, listening

LONG = 60.0
SOON = 30.0
"""Far below LONG, and far above what it takes on a busy machine."""


def gone(pid: int) -> bool:
    """Whether a process has ended; whoever adopted it may be slow to hear of it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def all_gone(pids: list[int]) -> bool:
    ends = time.monotonic() + SOON
    while not all(gone(pid) for pid in pids) and time.monotonic() < ends:
        time.sleep(0.01)
    return all(gone(pid) for pid in pids)


def own_children() -> set[int]:
    """Every child of this process, also one that ended and was not waited for."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    found = set()
    for pid in pids:
        try:
            parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid():
            found.add(pid)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left():
    children, descriptors, handlers = own_children(), len(os.listdir("/proc/self/fd")), signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    assert own_children() <= children
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert signal.getsignal(signal.SIGTERM) == handlers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


def sleeping(*command: str, **options: Any) -> int:
    return subprocess.Popen([*command, "sleep", "600"], **options).pid


def wait_for(path: Path) -> list[int]:
    """The numbers in a file that somebody writes in one piece."""
    ends = time.monotonic() + SOON
    while not path.exists() and time.monotonic() < ends:
        time.sleep(0.01)
    return [int(word) for word in path.read_text(encoding="utf-8").split()]


def write_whole(path: Path, *pids: int) -> None:
    path.with_suffix(".tmp").write_text(" ".join(map(str, pids)), encoding="utf-8")
    path.with_suffix(".tmp").rename(path)


# ---- what comes back


def test_what_comes_back_is_what_was_computed_to_the_last_bit() -> None:
    numbers = [random.Random(seed).uniform(-1, 1) * 10.0 ** (seed % 600 - 300) for seed in range(600)]
    numbers += [0.1, -0.0, 5e-324, sys.float_info.max, sys.float_info.min, 1 / 3]
    back = call_isolated(lambda: [*numbers, None], LONG)
    assert back[-1] is None
    assert [math.copysign(1, value) for value in back[:-1]] == [math.copysign(1, value) for value in numbers]
    assert back[:-1] == numbers


def test_an_answer_larger_than_a_pipe_comes_back_whole() -> None:
    assert call_isolated(lambda: list(range(300_000)), LONG) == list(range(300_000))  # 2 MB; a pipe holds 64 KiB


def test_the_arguments_are_there_without_being_copied_or_serialised() -> None:
    lock = threading.Lock()  # nothing that could be serialised
    assert call_isolated(lambda: [type(lock).__name__, lock.locked()], LONG) == ["lock", False]


def test_what_it_changes_is_its_own() -> None:
    seen: list[int] = []
    assert call_isolated(lambda: [seen.append(1), os.environ.pop("PATH", None), len(seen)][-1], LONG) == 1
    assert seen == []
    assert "PATH" in os.environ


def test_it_is_another_process_with_its_own_session_default_signals_and_no_input() -> None:
    def look() -> list[Any]:
        defaults = [signal.getsignal(number) == signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)]
        return [os.getpid(), os.getppid(), os.getsid(0), defaults, len(signal.pthread_sigmask(signal.SIG_BLOCK, ())), sys.stdin.read()]

    with listening():
        pid, parent, session, defaults, num_blocked, text = call_isolated(look, LONG)
    assert pid == session != os.getpid() == parent
    assert defaults == [True, True]
    assert num_blocked == 0
    assert text == ""


def test_torch_computes_with_one_thread_there_as_the_others_did_not_come_along() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        large = torch.ones(512, 512)
        assert float((large @ large).sum()) == 512**3  # both threads are at work here
        assert call_isolated(lambda: [torch.get_num_threads(), float((large @ large).sum())], LONG) == [1, 512**3]
    finally:
        torch.set_num_threads(threads)


def test_nothing_the_trainer_left_to_do_at_its_exit_is_done_there(tmp_path) -> None:
    program = f"""
import atexit, sys
from gemma_grpo.reward.isolated import call_isolated
atexit.register(lambda: open({str(tmp_path / "exits")!r}, "a").write("x"))
sys.stdout = open(sys.stdout.fileno(), "w", closefd=False)  # known to nobody else, so that it ends when it is replaced
sys.stdout.write("half a line, ")  # in the buffer when the process is started
print(call_isolated(lambda: 5, 60.0))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "half a line, 5\n"
    assert done.stderr == ""
    assert (tmp_path / "exits").read_text(encoding="utf-8") == "x"


def test_what_the_trainer_left_to_be_collected_is_not_collected_there(tmp_path) -> None:
    class Left:
        def __del__(self) -> None:
            (tmp_path / str(os.getpid())).touch()

    gc.disable()
    try:
        left = Left()
        left.itself = left
        del left
        assert call_isolated(lambda: [gc.collect(), gc.isenabled()][1], LONG) is False
    finally:
        gc.enable()
    assert not list(tmp_path.iterdir())
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_it_is_the_first_to_go_where_memory_runs_out() -> None:
    def score() -> int:
        return int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))

    assert call_isolated(score, LONG) == 1000 > score()


# ---- how it ends


def test_a_late_call_is_killed_with_all_it_started_also_what_made_itself_a_session(tmp_path) -> None:
    def start() -> None:
        daemon = tmp_path / "daemon"  # its parent ends before it
        subprocess.run(["sh", "-c", f"setsid sleep 600 >/dev/null 2>&1 & echo $! > {daemon}"], check=True)
        deaf = sleeping("sh", "-c", "trap '' TERM HUP INT; exec \"$@\"", "sh")
        write_whole(tmp_path / "pids", os.getpid(), sleeping(), sleeping(start_new_session=True), deaf, *wait_for(daemon))
        time.sleep(600)

    started = time.monotonic()
    with pytest.raises(LateError, match=r"^exceeded 2\.0 s$"):
        call_isolated(start, 2.0)
    assert 2.0 <= time.monotonic() - started < SOON
    pids = wait_for(tmp_path / "pids")
    assert len(set(pids)) == 5
    assert all_gone(pids)


def test_what_a_call_started_does_not_outlive_it_when_it_answers_either() -> None:
    pids = call_isolated(lambda: [os.getpid(), sleeping(), sleeping(start_new_session=True)], LONG)
    assert all_gone(pids)


def test_an_answer_is_not_waited_for_by_those_who_hold_the_pipes(tmp_path) -> None:
    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            time.sleep(600)
        return pid

    started = time.monotonic()
    assert all_gone([call_isolated(fork, LONG)])
    assert time.monotonic() - started < SOON


def test_a_call_that_ends_itself_takes_those_of_its_group_with_it(tmp_path) -> None:
    def end() -> None:
        write_whole(tmp_path / "pids", os.getpid(), sleeping())
        os._exit(7)

    started = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"^ended its process with exit code 7$"):
        call_isolated(end, LONG)
    assert time.monotonic() - started < SOON
    assert all_gone(wait_for(tmp_path / "pids"))


@pytest.mark.parametrize("deaf", [False, True])
def test_a_request_to_stop_is_noticed_while_it_is_waited_for(tmp_path, deaf) -> None:
    def wait() -> None:
        if deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        write_whole(tmp_path / "pids", os.getpid())
        time.sleep(600)

    def terminate(pid: int = os.getpid()) -> None:
        wait_for(tmp_path / "pids")
        os.kill(pid, signal.SIGTERM)

    started = time.monotonic()
    thread = threading.Thread(target=terminate)
    with listening():
        thread.start()
        with pytest.raises(Stopped, match="by SIGTERM"):
            call_isolated(wait, LONG)
    thread.join()
    assert time.monotonic() - started < SOON
    assert all_gone(wait_for(tmp_path / "pids"))


def test_an_interruption_outside_of_a_run_ends_it_too(tmp_path) -> None:
    program = f"""
import os, time
from gemma_grpo.reward.isolated import call_isolated
def wait():
    open({str(tmp_path / "pids.tmp")!r}, "w").write(str(os.getpid()))
    os.rename({str(tmp_path / "pids.tmp")!r}, {str(tmp_path / "pids")!r})
    time.sleep(600)
call_isolated(wait, 600.0)
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    pids = wait_for(tmp_path / "pids")
    trainer.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in trainer.communicate(timeout=SOON)[1]
    assert all_gone(pids)


def test_a_trainer_that_is_killed_leaves_no_process_behind(tmp_path) -> None:
    program = f"""
import os, signal, time
from gemma_grpo.reward.isolated import call_isolated
def wait():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open({str(tmp_path / "pids.tmp")!r}, "w").write(str(os.getpid()))
    os.rename({str(tmp_path / "pids.tmp")!r}, {str(tmp_path / "pids")!r})
    while True: pass
call_isolated(wait, 600.0)
"""
    trainer = subprocess.Popen([sys.executable, "-c", program])
    pids = wait_for(tmp_path / "pids")
    assert not gone(pids[0])
    trainer.kill()
    trainer.wait(timeout=SOON)
    assert all_gone(pids)


def test_a_trainer_without_standard_streams_has_its_answer_too(tmp_path) -> None:
    program = f"""
import os
os.closerange(0, 3)
from gemma_grpo.reward.isolated import call_isolated
answer = call_isolated(lambda: [os.write(1, b"hello"), os.read(0, 1).decode()], 60.0)
open({str(tmp_path / "answer")!r}, "w").write(repr(answer))
"""
    # buffered, as a user's interpreter is: text that can go nowhere must not wait there for the end
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True, env=environment)
    assert (tmp_path / "answer").read_text(encoding="utf-8") == "[5, '']"


def test_a_thread_may_ask_too() -> None:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(call_isolated(lambda: 5, LONG)))
    thread.start()
    thread.join()
    assert answers == [5]


def test_where_no_process_can_be_had_the_error_says_so() -> None:
    program = """
import os, resource
from gemma_grpo.config import RewardFunctionSettings
from gemma_grpo.reward.functions import FunctionReward
os.setuid(65534) if os.getuid() == 0 else None  # root may always have one more
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
FunctionReward(lambda **_: [], "mine", RewardFunctionSettings(timeout=60)).score([])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "RewardError: reward 'mine' could not be given a process ([Errno 11]" in done.stderr
    assert done.stderr.rstrip().endswith("Free memory, or use reward_function.timeout=null.")


# ---- what it prints


def test_what_it_prints_is_passed_on_with_control_characters_made_visible(capsys) -> None:
    def talk() -> int:
        print("out: \x1b[2J\u202etxt")
        print("half", end="", file=sys.stderr)
        sys.stdout.flush()
        os.write(2, b"\xff past Python\n")
        return 1

    assert call_isolated(talk, LONG) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    # standard error is by line too: what has none yet comes at the end
    assert printed.err == "out: \\x1b[2J\\u202etxt\n\\ufffd past Python\nhalf\n".replace("\\ufffd", "\ufffd")


def test_a_call_that_prints_a_gigabyte_fills_no_memory_and_does_not_hang(capsys) -> None:
    def flood() -> int:
        line = b"x" * 65_535 + b"\n"
        for _ in range(2**14):  # 65,536 bytes each: a gigabyte
            os.write(1, line)
        return 1

    before = peak_bytes()
    assert call_isolated(flood, 600.0) == 1
    assert peak_bytes() - before < 64 * 2**20
    printed = capsys.readouterr().err
    assert printed == "x" * 65_535 + f"\n... {2**30 - OUTPUT_LIMIT} bytes more left out\n"


def test_what_a_late_call_printed_is_passed_on_as_well(capsys) -> None:
    def talk() -> None:
        print("asking the judge", flush=True)
        time.sleep(600)

    with pytest.raises(LateError):
        call_isolated(talk, 2.0)
    assert capsys.readouterr().err == "asking the judge\n"


@pytest.mark.parametrize("stream", ["None", "open(os.devnull)", "closed()"])
def test_a_stderr_that_takes_nothing_costs_no_answer(stream) -> None:
    program = f"""
import os, sys
from gemma_grpo.reward.isolated import call_isolated
def closed():
    file = open(os.devnull, "w")
    file.close()
    return file
sys.stderr = {stream}
print(call_isolated(lambda: print("hello") or 5, 60.0))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "5\n"


def peak_bytes() -> int:
    """Of this process, since it began."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


