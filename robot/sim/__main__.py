"""The simulated Panda behind SERL's HTTP protocol.

python -m robot.sim serve                              in real time, like a robot: http://127.0.0.1:5000/
python -m robot.sim serve --port 0 --clock lockstep    the world waits for commands, as fast as the machine allows
"""

import argparse
import os
import signal
import sys
import threading

from common.errors import UserError
from robot.sim import explain_import_errors
from robot.sim.grippers import GRIPPERS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m robot.sim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument(
        "--port",
        type=int,
        default=5000,
        help="port on 127.0.0.1; 0 is any free one (default: 5000)",
    )
    parser.add_argument(
        "--clock", choices=["realtime", "lockstep"], default="realtime", help="default: realtime"
    )
    parser.add_argument(
        "--gripper", choices=[*GRIPPERS], default="serl", help="gripper to simulate (default: serl)"
    )
    parser.add_argument(
        "--faults", action="store_true", help="accept orders for faults (POST /sim/fault)"
    )
    parser.add_argument(
        "--child", action="store_true", help="end with standard input, and ignore Ctrl-C"
    )
    args = parser.parse_args()
    try:
        with explain_import_errors():
            from robot.sim.server import SimServer  # imports MuJoCo

        server = SimServer(args.port, args.clock, args.gripper, args.faults)
    except OSError as error:
        sys.exit(f"error: port {args.port} is not available ({error}): use another --port")
    except UserError as error:
        sys.exit(f"error: {error}")
    if args.child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=end_with_stdin, daemon=True).start()
    print(server.url, flush=True)
    try:
        server.run()
    except KeyboardInterrupt:
        server.server_close()


def end_with_stdin() -> None:
    """End this process when its parent does."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
