"""No program does harm, seen from outside: no file, no packet, no process left, the trainer alive; and each is reported by how it ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cells import inside
from hostile_programs import HOSTILE

from gemma_grpo.reward.sandbox.running import Limits, run_program, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"programs cannot be shut in here: {why_not()}")
LIMITS, PATIENT = Limits(seconds=1.0, memory_mib=256), Limits(seconds=20.0, memory_mib=256)
"""The second for programs that end by themselves, however slow a machine under load is."""


class World:
    """What a program could reach if it were not shut in."""

    def __init__(self, folder: Path) -> None:
        self.outside, self.home = folder / "outside", folder / "home"
        (self.home / ".ssh").mkdir(parents=True)
        self.token = self.home / "token"
        for file in (self.token, self.home / ".ssh" / "id_rsa"):
            file.write_text("hf_thisIsTheToken", encoding="utf-8")
        folder.chmod(0o777)  # whoever the program is, rights alone must not be what keeps it out
        self.home.chmod(0o777)
        self.unix, self.abstract = str(folder / "s"), f"gemma-grpo-test-{os.getpid()}"
        self.sockets = [socket.socket(family, kind) for family, kind in ((2, 1), (2, 2), (1, 1), (1, 1))]
        self.sockets[0].bind(("127.0.0.1", 0))
        self.port = self.sockets[0].getsockname()[1]
        self.sockets[1].bind(("127.0.0.1", self.port))
        self.sockets[2].bind(self.unix)
        os.chmod(self.unix, 0o777)
        self.sockets[3].bind(f"\0{self.abstract}")
        for one in (self.sockets[0], *self.sockets[2:]):
            one.listen()
        self.before = self.files()

    def files(self) -> list[str]:
        return sorted(str(path) for path in self.outside.parent.rglob("*"))

    def source(self, text: str) -> str:
        names = {"outside": self.outside, "home": self.home, "token": self.token, "unix": self.unix, "abstract": self.abstract}
        for name, value in {**names, "port": self.port, "trainer": os.getpid()}.items():
            text = text.replace(f"@{name}@", str(value))
        return text

    def harm(self) -> list[str]:
        found = [f"{path} is there" for path in self.files() if path not in self.before]
        for one in self.sockets:
            one.settimeout(0.0)
            with suppress(BlockingIOError):
                found.append(f"reached: {one.recv(9) if one.type == socket.SOCK_DGRAM else one.accept()}")
        return found

    def close(self) -> None:
        for one in self.sockets:
            one.close()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsTheToken")
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which lies in a folder that is its user's alone
        made = World(Path(folder))
        monkeypatch.setenv("HOME", str(made.home))
        yield made
        made.close()


def test_there_are_fifty_and_each_is_told_apart() -> None:
    assert len(HOSTILE) >= 50
    assert len({one.source for one in HOSTILE.values()}) == len(HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_no_harm_and_is_reported(name: str, world: World) -> None:
    hostile, threads = HOSTILE[name], threading.active_count()
    started = time.monotonic()
    outcome = run_program(world.source(hostile.source), ["win()"], LIMITS if "time" in hostile.kinds else PATIENT)
    assert outcome.kind in hostile.kinds, outcome
    assert outcome.values.get(0) != hostile.expected
    assert time.monotonic() - started < 120  # of a machine under load
    assert inside() == []
    assert world.harm() == []
    assert threading.active_count() == threads


def test_what_it_must_not_reach_can_be_reached_from_here(world: World) -> None:
    """Or all of the above would pass by a world that nobody can touch."""
    sources = ("write outside", "connect", "a unix socket", "an abstract unix socket", "a datagram")
    for name in sources:
        subprocess.run([sys.executable, "-c", world.source(HOSTILE[name].source)], check=True)
        assert len(world.harm()) >= 1, name
    assert subprocess.check_output(["cat", str(world.token)]) == b"hf_thisIsTheToken"


def test_nothing_is_left_when_the_trainer_is_killed(tmp_path: Path) -> None:
    code = "from gemma_grpo.reward.sandbox.running import run_program\nprint('go', flush=True)\n"
    code += "run_program('import os, time\\nif os.fork() == 0: os.setsid()\\ntime.sleep(1000)', [])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        trainer.stdout.readline()
        deadline = time.monotonic() + 60
        while len(inside(trainer.pid)) < 4:  # supervisor, init, the program, its child
            assert time.monotonic() < deadline
            time.sleep(0.01)
        trainer.kill()
        trainer.wait()
    while inside(trainer.pid):
        assert time.monotonic() < deadline + 60, inside(trainer.pid)
        time.sleep(0.01)


OTHER_USER = ("setpriv", "--reuid=65533", "--regid=65533", "--clear-groups")
STARTS_ITSELF = "import subprocess, sys; assert sys.version_info >= (3, 10); subprocess.run([sys.executable, '-c', '1'], check=True)"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else; every other test here is that somebody's")
def test_the_same_holds_for_a_user_without_rights() -> None:
    """The road of those who are not root: another map of users, and nobody to become."""
    pythons = [one for one in (sys.executable, "/usr/bin/python3") if Path(one).exists()]
    tried = {one: subprocess.run([*OTHER_USER, one, "-c", STARTS_ITSELF], check=False, capture_output=True) for one in pythons}
    usable = [one for one, done in tried.items() if done.returncode == 0]
    if not usable:
        pytest.skip("another user can run no Python from 3.10 on here (its folder is root's alone)")
    code = f"import os, sys\nsys.path.insert(0, {str(Path(__file__).resolve().parents[3])!r})\n"
    code += "from gemma_grpo.reward.sandbox.running import run_program\n"
    code += "print(os.getuid(), run_program('import os, socket', ['os.getuid()', 'os.getpid()']).values)\n"
    code += "print(run_program('open(\"/etc/passwd\")', []).kind, run_program('import os\\nwhile 1: os.fork()', []).kind)"
    done = subprocess.run([*OTHER_USER, usable[0], "-B", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["65533 {0: 65534, 1: 2}", "refused refused"]
