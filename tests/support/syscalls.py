"""Kill a function between two of its system calls, by ptrace (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from collections.abc import Callable

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_STOP_IS_CALL, _KILL_WITH_TRACER = 0x1, 0x100000
_CALL_STOP = signal.SIGTRAP | 0x80
_REFUSED, _RAISED = 97, 98

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


class PtraceRefused(RuntimeError):
    """The system does not let processes be traced: run where it does, as root or in a container
    with the capability SYS_PTRACE."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"ptrace is refused ({reason}). {type(self).__doc__}")


def run_until_call(
    action: Callable[[], object],
    number: float,
    before_call: Callable[[int, int], object] = lambda number, pid: None,
) -> bool:
    """Fork, run `action` in the child and kill it just before its system call `number` (1, 2, ...).

    False if it ended by itself before, without an error. `before_call` is called here, with the
    number and the child's pid, while the child stands before each of its calls up to that. Calls of
    other threads do not count and are not stopped at, so `action` should start none. Raises
    `RuntimeError` if it raised.
    """
    child = os.fork()
    if child == 0:
        _be_traced(action)
    try:
        if os.WIFEXITED(_wait(child)):
            raise PtraceRefused("PTRACE_TRACEME failed")
        options = _STOP_IS_CALL | _KILL_WITH_TRACER
        if _ptrace(_SETOPTIONS, child, options) != 0:
            raise PtraceRefused(os.strerror(ctypes.get_errno()))
        return _count(child, number, before_call)
    except BaseException:
        _end(child)
        raise


def _be_traced(action: Callable[[], object]) -> None:
    status = _REFUSED
    try:
        if _ptrace(_TRACEME, 0, 0) == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            status = _RAISED
            action()
            status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _count(child: int, number: float, before_call: Callable[[int, int], object]) -> bool:
    """Let a stopped child go on to its `number`-th call. Each call stops it on entry and return."""
    stops, deliver = 0, 0
    while True:
        _ptrace(_SYSCALL, child, deliver)
        status = _wait(child)
        deliver = 0
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status) != 0:
                raise RuntimeError("the traced function raised; its traceback is above")
            return False
        if os.WIFSIGNALED(status):
            raise RuntimeError(f"the traced function died of signal {os.WTERMSIG(status)}")
        if os.WSTOPSIG(status) != _CALL_STOP:
            deliver = os.WSTOPSIG(status)
            continue
        stops += 1
        if stops % 2:
            before_call(stops // 2 + 1, child)
            if stops // 2 + 1 == number:
                _end(child)
                return True


def _end(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        while not os.WIFSIGNALED(_wait(child)):
            pass
    except (ProcessLookupError, ChildProcessError):
        pass


def _wait(child: int) -> int:
    return os.waitpid(child, 0)[1]


def _ptrace(request: int, child: int, data: int) -> int:
    result: int = _libc.ptrace(request, child, None, ctypes.c_void_p(data))
    return result
