"""A process without threads that forks the victims: torch is imported once, and a fork of it cannot hang on another's lock.

Reads lines of JSON: {"call": name, "args": […]} forks and answers the child's number; {"wait": number, "seconds": n}
answers how it ended: its exit code, -9 if killed, "hung" if it had to be.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback

from tests.faults import victims


def main() -> None:
    for line in sys.stdin:
        wish = json.loads(line)
        answer = fork(wish["call"], wish["args"]) if "call" in wish else wait(wish["wait"], wish["seconds"])
        print(json.dumps(answer), flush=True)


def fork(name: str, args: list[object]) -> int:
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(2, 1)
            getattr(victims, name)(*args)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def wait(child: int, seconds: float) -> int | str:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


if __name__ == "__main__":
    main()
