"""A Python that has imported torch and transformers already. A stage of a test takes 9 s of CPU for these imports, the
rest of it often less, and the tests run a hundred stages.

    warm.py SERVER stage_rl.py ...   what `python stage_rl.py ...` does, in a process that is forked from the server
    warm.py SERVER -c ...            anything but a script of the project's: what Python itself does
    warm.py --serve SERVER           the server; SERVER is the path of a socket. It ends with its standard input

Every stage begins with the project's own files unread, its own arguments, environment and folder. When warm.py is
killed so is the stage with all its processes; other signals do not reach it, so what sends those takes Python.
"""

import contextlib
import os
import socket
import sys


def ask(server, argv):
    """The exit code of `python argv...`, run by the server with this process's environment, folder and streams."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        words = [os.getcwd(), str(len(argv)), *argv, *(f"{k}={v}" for k, v in os.environ.items())]
        socket.send_fds(connection, ["\0".join(words).encode() + b"\0\0"], [0, 1, 2])
        code = int(connection.makefile().read())
    if code < 0:  # a signal's
        os.kill(os.getpid(), -code)
    return code


def serve(server):
    """Runs what it is asked, each in a process of its own."""
    import runpy
    import select
    import signal
    from pathlib import Path

    root = Path(__file__).parent.parent
    sys.path[0] = str(root)
    import plan  # noqa: F401
    import report  # noqa: F401
    import stage_rl  # noqa: F401
    import stage_sft  # noqa: F401

    own = {"domains", *(p.stem for p in root.glob("*.py"))}
    for name in [n for n in sys.modules if n.split(".")[0] in own]:  # a stage reads those that lie beside it
        del sys.modules[name]
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(server + ".new")
    listening.listen()
    os.rename(server + ".new", server)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system takes note of ended children
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listening.accept()
        if os.fork() == 0:
            break
        connection.close()

    # From here on in the process of one command, which has a child that runs it and says how that ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listening.close()
    asked, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not asked.endswith(b"\0\0"):
        asked += connection.recv(1 << 20)
    child = os.fork()
    os.setpgid(child, child)  # on both sides: whoever is first
    if child:
        if connection in select.select([connection, os.pidfd_open(child)], [], [])[0]:  # its end: warm.py is gone
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    folder, count, *words = asked[:-2].decode().split("\0")
    sys.argv, variables = words[: int(count)], words[int(count) :]
    os.environ.clear()
    os.environ.update(v.split("=", 1) for v in variables)
    os.chdir(folder)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    script = os.path.abspath(sys.argv[0])
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")  # its end is this process's


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    if first == "--serve":
        serve(*rest)
    elif rest and rest[0].endswith(".py"):
        sys.exit(ask(first, rest))
    else:
        os.execv(sys.executable, [sys.executable, *rest])
