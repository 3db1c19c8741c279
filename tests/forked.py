"""Python programs without their start-up: a process that has imported torch and the library forks them.

Starting one takes five seconds of imports, and the guides alone start fifty. A program that is forked finds the modules imported, and
is otherwise a process of its own, in a session of its own: its arguments, folder, environment, standard files and exit code are those
of the command `python` that asks for it. If that command is killed, so is the program.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = (
    "indistill_fx.cli.compress", "indistill_fx.cli.distill", "indistill_fx.training.compare", "sklearn.datasets",
    "torch._dynamo", "torchmetrics", "torchvision", "tests.faults.harness",
)  # fmt: skip
COMMAND = """\
#!{python} -IS
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({path!r})
wish = json.dumps([{before!r} + sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
server.sendmsg([wish], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
code = int(server.recv(100) or 1)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextmanager
def forked() -> Iterator[Path]:
    """Within the block, a folder for a PATH: its commands `python` and `indistill-fx` are forked."""
    with tempfile.TemporaryDirectory() as place:  # the path of a socket may have a hundred characters
        path, commands = f"{place}/socket", Path(place) / "bin"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "tests.forked", path]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            commands.mkdir()
            for name, before in (("python", []), ("indistill-fx", ["-m", "indistill_fx"])):
                (commands / name).write_text(COMMAND.format(python=sys.executable, path=path, before=before))
                (commands / name).chmod(0o755)
            try:
                yield commands
            finally:
                server.kill()


def serve(path: str) -> list[str]:
    """Fork for every command; in the fork, return what is to be run."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(path)
    listening.listen(64)
    print("ready", flush=True)
    asking: dict[int, socket.socket] = {}
    while True:
        ready = select.select([listening, *asking.values()], [], [], 0.01 if asking else None)[0]
        if listening in ready:
            client = listening.accept()[0]
            text, files, *_ = socket.recv_fds(client, 1 << 20, 3)
            command, cwd, environment = json.loads(text)
            child = os.fork()
            if child == 0:
                become(files, cwd, environment)
                return list(command)
            asking[child] = client
            for file in files:
                os.close(file)
        for child, client in list(asking.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                with suppress(OSError):  # the command may be gone
                    client.send(str(os.waitstatus_to_exitcode(status)).encode())
                asking.pop(child).close()
            elif client in ready:  # it was killed
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)


def become(files: list[int], cwd: str, environment: dict[str, str]) -> None:
    """Take over standard files, folder and environment of the command."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 1024)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*filter(None, paths), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]


def main(command: list[str]) -> None:
    """As Python's own command line, but that the modules are not taken apart at the end, which takes two seconds in a fork."""
    code: object = 0
    command = [part for part in command[:1] if part != "-u"] + command[1:]
    try:
        if command[0] == "-m":
            sys.argv, sys.path[:0] = command[1:], [os.getcwd()]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = command, [str(Path(command[0]).resolve().parent)]
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120  # as Python's own
    os._exit(code)


if __name__ == "__main__":
    for module in IMPORTS:
        importlib.import_module(module)
    gc.freeze()
    threads = {Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")}
    threads -= {"jemalloc_bg_thd"}  # pyarrow's; it takes care of forks
    assert len(threads) == 1, "a fork of a process with threads may hang"
    main(serve(sys.argv[1]))
