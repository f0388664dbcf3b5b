"""A Python that has imported torch and transformers already.

A stage of a test takes 9 s of CPU for these imports, often more than for the rest, and the tests run a hundred stages.

    warm.py SERVER stage_rl.py ...   does what `python stage_rl.py ...` does, in a process forked from the server
    warm.py SERVER -m tools.plan ... the same for one of the project's modules
    warm.py SERVER -c ...            anything else: starts Python itself
    warm.py --serve SERVER           the server; SERVER is the path of a socket. It ends when its standard input does

Every stage begins with the project's own files unread, its own arguments, environment and folder. When warm.py is
killed, so is the stage with all its processes. Other signals do not reach it, so a test that sends those uses Python.
"""

import contextlib
import os
import socket
import sys


def is_ours(argv):
    """Whether these arguments of Python run one of the project's scripts or modules."""
    return bool(argv) and (
        argv[0].endswith(".py") or (argv[0] == "-m" and argv[1].startswith(("tools.", "robot.")))
    )


def ask(server, argv):
    """Return the exit code of `python argv...`, run by the server with this process's environment and streams."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        words = [os.getcwd(), str(len(argv)), *argv, *(f"{k}={v}" for k, v in os.environ.items())]
        socket.send_fds(connection, ["\0".join(words).encode() + b"\0\0"], [0, 1, 2])
        code = int(connection.makefile().read())
    if code < 0:  # a signal's
        os.kill(os.getpid(), -code)
    return code


def serve(server):
    """Run what is asked for, each in a process of its own."""
    import gc
    import runpy
    import select
    import signal
    from pathlib import Path

    root = Path(__file__).parent.parent
    sys.path[0] = str(root)
    import imageio.v2  # noqa: F401
    import matplotlib.pyplot  # noqa: F401

    import report  # noqa: F401
    import stage_rl  # noqa: F401
    import stage_sft  # noqa: F401
    from tools import compare, plan  # noqa: F401

    folders = {p.parent.name for p in root.glob("*/*.py")}
    ours = folders | {p.stem for p in root.glob("*.py")}
    for name in [
        n for n in sys.modules if n.split(".")[0] in ours
    ]:  # a stage reads those of its own project
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # else the end of each process would walk, and so copy, all objects of this one: 5 s
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(server + ".new")
    listening.listen()
    os.rename(server + ".new", server)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps the children
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listening.accept()
        if os.fork() == 0:
            break
        connection.close()

    # From here on this is the process of one command. Its child runs it, and it reports how that ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listening.close()
    asked, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not asked.endswith(b"\0\0"):
        asked += connection.recv(1 << 20)
    child = os.fork()
    os.setpgid(child, child)  # on both sides: whoever is first
    if child:
        if (
            connection in select.select([connection, os.pidfd_open(child)], [], [])[0]
        ):  # its end: warm.py is gone
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    folder, count, *words = asked[:-2].decode().split("\0")
    sys.argv = words[: int(count)]
    variables = words[int(count) :]
    os.environ.clear()
    os.environ.update(v.split("=", 1) for v in variables)
    os.chdir(folder)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    if sys.argv[0] == "-m":
        _, module, *sys.argv[1:] = sys.argv
        sys.path[0] = folder
        runpy.run_module(module, run_name="__main__", alter_sys=True)  # its end is this process's
    else:
        script = os.path.abspath(sys.argv[0])
        sys.path[0] = os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    if first == "--serve":
        serve(*rest)
    elif is_ours(rest):
        sys.exit(ask(first, rest))
    else:
        os.execv(sys.executable, [sys.executable, *rest])
