"""The inside of the sandbox: shuts itself in, then runs somebody's Python. Started by its path; imports nothing of the package.

    trainer ── supervisor ──│── init of the namespaces ── program
                            │   no network, no /proc, no other process, files: the standard library read-only, and an empty /tmp

Whoever is right of the line is not trusted: it gets no expected value, and all it can send is what its calls return. Everything here is
done without privileges; root's programs run as "nobody". Needs Linux 5.12. What the answers mean is running.py's.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import sys
from typing import Any, NoReturn

MIB = 2**20
NOBODY = 65534
"""The user and group inside; outside too, where the trainer is root: limits on processes do not bind root."""
SHUT = b"shut\n"
"""What the status pipe says once nothing is open any more."""
_ALL_NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000 | 0x08000000 | 0x04000000  # user, pid, net, mount, ipc, uts
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE, _DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
_SYS_KEYCTL, _JOIN_SESSION_KEYRING = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}, 1
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_GRACE_SECONDS = 600
"""Longer than the trainer waits; then init ends all by itself, whatever became of the trainer."""

_libc = ctypes.CDLL(None, use_errno=True)


def _called(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _called(_libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def _pivot_root(new: str, old: str) -> None:
    number = _SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"pivot_root: its number is not known for {os.uname().machine}")
    _called(_libc.syscall(number, os.fsencode(new), os.fsencode(old)), "pivot_root")


def _read_only(path: str, *, recursive: bool) -> None:
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    _called(_libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, attributes, 32), f"mount_setattr {path}")


def _prctl(option: int, value: int) -> None:
    _called(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def _new_namespaces() -> None:
    """Leave every namespace; the user's number inside is given by a process that stayed outside, as only that may."""
    outside, ready = os.getpid(), os.pipe()
    helper = os.fork()
    if helper == 0:
        code = 1
        try:
            os.close(ready[1])
            if os.read(ready[0], 1):
                _map_users(outside)
                code = 0
        except OSError as error:
            code = error.errno or 1
        finally:
            os._exit(code)
    os.close(ready[0])
    try:
        _called(_libc.unshare(_ALL_NAMESPACES), "unshare")
        os.write(ready[1], b"x")
    finally:
        os.close(ready[1])
        code = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if code != 0:
        raise OSError(code, f"uid_map: {os.strerror(code)}")
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _map_users(pid: int) -> None:
    """Root is root for the mounts, and there is somebody to become afterwards; anybody else is NOBODY at once."""
    user, group = os.geteuid(), os.getegid()
    if user != 0:
        _write(f"/proc/{pid}/setgroups", "deny")
    _write(f"/proc/{pid}/uid_map", f"0 0 1\n{NOBODY} {NOBODY} 1\n" if user == 0 else f"{NOBODY} {user} 1\n")
    _write(f"/proc/{pid}/gid_map", f"0 0 1\n{NOBODY} {NOBODY} 1\n" if user == 0 else f"{NOBODY} {group} 1\n")


def _write(path: str, text: str) -> None:
    number = os.open(path, os.O_WRONLY)
    try:
        os.write(number, text.encode())
    finally:
        os.close(number)


def _new_root(place: str, files_mib: int) -> None:
    """A file system of its own: libraries and the standard library, read-only, and an empty /tmp in memory; the old one is let go."""
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", place, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    sources = {path: os.path.realpath(path) for path in _shown_folders()}
    os.chdir(place)
    for folder in ("old", "new"):
        os.mkdir(folder)
    _pivot_root(".", "old")
    os.chdir("/")
    _mount("tmpfs", "/new", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path, source in sources.items():
        os.makedirs(f"/new{path}", mode=0o755, exist_ok=True)
        _mount(f"/old{source}", f"/new{path}", None, _BIND | _REC)
        _read_only(f"/new{path}", recursive=True)
    os.makedirs("/new/tmp", exist_ok=True)
    _mount("tmpfs", "/new/tmp", "tmpfs", _NOSUID | _NODEV | _NOEXEC, f"size={files_mib}m,nr_inodes=1024,mode=1777")
    _read_only("/new", recursive=False)
    os.chdir("/new")
    _pivot_root(".", ".")
    _called(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/tmp")


def _shown_folders() -> list[str]:
    """Where Python's standard library and what it links to lie; none inside another."""
    candidates = [*_LIBRARIES, os.path.join(sys.base_prefix, "lib"), *sys.path]
    found = sorted({os.path.abspath(path) for path in candidates if os.path.isdir(path) and os.path.abspath(path) not in ("/", "/tmp")})
    return [path for path in found if not any(path.startswith(f"{other}/") for other in found)]


def _give_up_rights() -> None:
    """Nobody's rights for good: no capability, none to be had again by running a file, no further namespaces."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if number := _SYS_KEYCTL.get(os.uname().machine):
        _libc.syscall(number, _JOIN_SESSION_KEYRING, None)  # an empty one; where it is forbidden, so is reading the trainer's
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _called(_libc.capset(header, nothing), "capset")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)  # of init: the program cannot look into it; its own process is another
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(job: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: (job["cpu_seconds"], job["cpu_seconds"] + 1),
        resource.RLIMIT_AS: (job["memory_mib"] * MIB,) * 2,
        resource.RLIMIT_FSIZE: (job["file_mib"] * MIB,) * 2,
        resource.RLIMIT_NPROC: (job["processes"],) * 2,
        resource.RLIMIT_NOFILE: (job["open_files"],) * 2,
        **dict.fromkeys((resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE), (0, 0)),
    }
    for which, (soft, hard) in limits.items():
        _, before = resource.getrlimit(which)  # a limit that holds already cannot be raised
        kept = [value if before == resource.RLIM_INFINITY else min(value, before) for value in (soft, hard)]
        resource.setrlimit(which, (kept[0], kept[1]))


# ---- right of the line


def _init(job: dict[str, Any], status: int, results: int) -> NoReturn:
    """Process 1 of its namespace: when it ends, the kernel ends all others there, whatever they made of themselves."""
    try:
        _new_root(job["place"], job["files_mib"])
        _give_up_rights()
        _limit(job)
        # a signal from inside cannot end process 1; its own alarm can
        signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
        signal.alarm(job["cpu_seconds"] + _GRACE_SECONDS)
        os.write(status, SHUT)
        os.close(status)
        program = os.fork()
    except BaseException as error:
        _refuse(status, error)
    if program == 0:
        _run(job, results)
    os.close(results)
    _silence()
    while True:
        pid, ended = os.wait()
        if pid == program:
            code = os.waitstatus_to_exitcode(ended)
            os._exit(code if code >= 0 else 128 - code)


def _refuse(status: int, error: BaseException) -> NoReturn:
    text = f"{error.strerror if isinstance(error, OSError) else repr(error)}\n"
    for number in (status, 2):
        try:
            os.write(number, text.encode())
        except OSError:
            continue
    os._exit(1)


def _silence() -> None:
    """Let go of the output: it ends when the last program does. Opens nothing in its place: while init moves the root, no path is sure."""
    for number in (0, 1, 2):
        os.close(number)


def _run(job: dict[str, Any], results: int) -> NoReturn:
    """The program, then the calls of its tests, one line of JSON for each; it never comes back."""
    code = 1
    try:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _prctl(_PR_SET_DUMPABLE, 1)
        _serve(job, results)
        code = 0
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
    finally:
        os._exit(code)


def _serve(job: dict[str, Any], results: int) -> None:
    from types import FunctionType, ModuleType

    def send(line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[os.write(results, data) :]

    send({"begun": True})  # without it the trainer knows that nothing of the program's has run
    module = sys.modules["program"] = ModuleType("program")
    vars(module)["__builtins__"] = __builtins__  # what C code imports on a program's behalf is looked up there
    try:
        code = compile(job["program"], "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return send({"syntax": _described(error)})
    try:
        FunctionType(code, vars(module))()
        send({"ran": True})
    except BaseException as error:
        return send({"error": _described(error)})
    for number, call in enumerate(job["calls"]):
        try:
            value = FunctionType(compile(call, "<test>", "eval", dont_inherit=True), vars(module))()
            send({"call": number, "value": _sendable(value)})
        except BaseException as error:
            send({"call": number, "error": _described(error)})
    return None


def _described(error: BaseException) -> list[Any]:
    """Type, errno or null, the beginning of the message."""
    try:
        message = str(error)[:200]
    except BaseException:
        message = ""
    number = getattr(error, "errno", None)
    return [type(error).__name__[:60], number if isinstance(number, int) else None, message]


def _sendable(value: Any) -> Any:
    """A value as JSON that tells lists, tuples, sets and dicts apart; what is none of Python's plain values becomes its type's name."""
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    for kind, name in ((list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "set")):
        if isinstance(value, kind):
            return [name, [_sendable(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[_sendable(key), _sendable(item)] for key, item in value.items()]]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    return ["other", type(value).__name__[:60]]


# ---- left of it


def main() -> NoReturn:
    """The supervisor: reads the job, shuts the door, waits. Arguments: the trainer's process, then the pipes for status and results."""
    parent, status, results = (int(word) for word in sys.argv[1:4])
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        job = json.loads(sys.stdin.buffer.read())
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        _write("/proc/self/oom_score_adj", "1000")
        _new_namespaces()
        init = os.fork()
    except BaseException as error:
        _refuse(status, error)
    if init == 0:
        _init(job, status, results)
    os.close(status)
    os.close(results)
    _silence()
    os._exit(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]) & 0xFF)


if __name__ == "__main__":
    main()
