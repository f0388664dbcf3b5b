"""SERL's robot server in front of a simulated World: its routes, bodies, status codes and habits.

Upstream is rail-berkeley/serl and hil-serl, robot_servers/franka_server.py. The routes under /sim/
belong to no robot: two cameras, the hands that put an object on the table, the eye that sees it
lifted, and faults to order.
"""

import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from scipy.spatial.transform import Rotation

from common.errors import UserError
from robot.limits import PERIOD
from robot.sim.objects import TASKS
from robot.sim.scene import TICK
from robot.sim.world import RESET_Q, World

FAULTS = {  # faults that can be ordered
    "reflex": "the arm brakes until /clearerr",
    "user_stop": "the arm brakes, and /clearerr does nothing until this fault is ended",
    "error": "the next n requests are answered with 500",
    "hang": "no request is answered for n seconds",
    "drop": "the next n requests get a closed connection as answer",
    "nan": "the next n states hold a NaN",
    "no_state": "the next n reads are answered with 500, as before the first message of the state topic",
    "frozen_state": "the state does not change",
    "reset_lies": "the next n joint resets do not move the arm, and are answered with 200",
    "reset_fails": "the next n joint resets start the joint controller, and are answered with 500",
    "slow_controller": "n seconds until the impedance controller runs after /jointreset has been answered",
    "slow_param": "n seconds until /update_param is answered",
    "stuck_gripper": "the fingers stay where they are",
    "frozen_camera": "the frames do not change, and age",
    "restart": "the robot server restarts: it forgets the gripper and the compliance",
}


class SimServer(ThreadingHTTPServer):
    """The HTTP server. The World belongs to the thread of `run`, and other threads hand it jobs.

    clock: "realtime", or "lockstep", where the world stands still except for the PERIOD that each
    /pose lets pass. faults: whether faults may be ordered (POST /sim/fault).
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, port: int = 5000, clock: str = "realtime", gripper: str = "serl", faults: bool = False
    ):
        super().__init__(("127.0.0.1", port), Handler)
        self.clock = clock
        self.gripper = gripper
        self.ordering = faults
        self.jobs = queue.SimpleQueue()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def run(self) -> None:
        """Serve until `stop`."""
        self.world = World(self.gripper)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        due = time.monotonic()
        while True:
            wait = None
            if self.clock == "realtime":
                behind = time.monotonic() - due
                if behind > 1:  # the machine slept, or cannot keep up
                    due += behind
                while due <= time.monotonic():
                    self.world.advance(5 * TICK)
                    due += 5 * TICK
                wait = max(0.0, due - time.monotonic())
            try:
                job, answer = self.jobs.get(timeout=wait)
            except queue.Empty:
                continue
            if job is None:
                break
            try:
                answer.put((job(self.world), None))
            except Exception as error:  # noqa: BLE001  every error becomes a 500, as in Flask
                answer.put((None, error))
        self.world.close()
        self.shutdown()
        self.server_close()

    def stop(self) -> None:
        self.jobs.put((None, None))

    def do(self, job: Callable[[World], object]) -> object:
        """Return `job(world)`, run in the world's thread."""
        answer = queue.SimpleQueue()
        self.jobs.put((job, answer))
        value, error = answer.get()
        if error is not None:
            raise error
        return value

    def wait(self, seconds: float) -> None:
        """Let the world's time pass."""
        if self.clock == "realtime":
            time.sleep(seconds)
        else:
            self.do(lambda world: world.advance(seconds))


# ----------------------------------------------------------------------------------------------------------------------
# SERL's routes. Each takes (server, the request's JSON or None) and returns text, or a dict that is
# sent as JSON.

Route = Callable[[SimServer, object], object]


def reading(key: str, name: str = "") -> Route:
    """Return a route that answers with one value of the state."""

    def route(server, _):
        return {name or key: server.do(World.state)[key]}

    return route


def command(text: str, work: Callable[[World, object], None]) -> Route:
    """Return a route that answers with `text` after `work(world, body)`."""

    def route(server, body):
        server.do(lambda world: work(world, body))
        return text

    return route


def getstate(server: SimServer, _) -> dict:
    return server.do(World.state)


def getpos_euler(server: SimServer, _) -> dict:
    pose = server.do(World.state)["pose"]
    return {"pose": [*pose[:3], *Rotation.from_quat(pose[3:]).as_euler("xyz")]}


def pose(server: SimServer, body: dict) -> str:
    """Accept a pose whether or not a controller listens, as upstream does."""
    server.do(lambda world: world.aim(body["arr"]))
    if server.clock == "lockstep":
        server.wait(PERIOD)
    return "Moved"


def update_param(server: SimServer, body: dict) -> str:
    time.sleep(server.world.faults.get("slow_param", 0))
    server.do(lambda world: world.set_parameters(body))
    return "Updated compliance parameters"


def jointreset(server: SimServer, _) -> str:
    """Upstream's order and times. It answers the same whether the arm arrived or not."""
    server.do(World.clear_errors)
    server.do(World.stop_controller)
    server.wait(1)
    server.do(World.clear_errors)
    server.wait(3)
    server.do(World.clear_errors)
    if server.do(lambda world: world.use_fault("reset_lies")):
        server.do(World.start_impedance)
        server.wait(5)
        return "Reset Joint"
    server.do(lambda world: world.start_joint_controller(RESET_Q))
    server.wait(1)
    server.do(World.clear_errors)
    if server.do(lambda world: world.use_fault("reset_fails")):
        raise TypeError("upstream subtracts numbers from --reset_joint_target, a list of strings")
    for _ in range(30):
        server.wait(1)
        if np.abs(np.subtract(server.do(World.state)["q"], RESET_Q)).max() < 0.01:
            break
    server.do(World.stop_controller)
    server.wait(1)
    delay = server.do(lambda world: world.faults.pop("slow_controller", 0))
    if delay:
        threading.Timer(delay, server.do, (World.start_impedance,)).start()
        return "Reset Joint"
    server.do(World.start_impedance)
    server.wait(4)
    return "Reset Joint"


def startimp(server: SimServer, _) -> str:
    server.do(World.clear_errors)
    server.do(World.start_impedance)
    server.wait(5)
    return "Started impedance"


def stopimp(server: SimServer, _) -> str:
    server.do(World.stop_controller)
    server.wait(1)
    return "Stopped impedance"


def move_gripper(world: World, body: dict) -> None:
    position = min(max(int(body["gripper_pos"]), 0), 255)
    world.set_width(world.gripper.move(position))


ROUTES = {
    "getstate": getstate,
    "getpos": reading("pose"),
    "getpos_euler": getpos_euler,
    "getvel": reading("vel"),
    "getforce": reading("force"),
    "gettorque": reading("torque"),
    "getq": reading("q"),
    "getdq": reading("dq"),
    "getjacobian": reading("jacobian"),
    "get_gripper": reading("gripper_pos", "gripper"),
    "pose": pose,
    "update_param": update_param,
    "clearerr": command("Clear", lambda world, _: world.clear_errors()),
    "jointreset": jointreset,
    "startimp": startimp,
    "stopimp": stopimp,
    "open_gripper": command("Opened", lambda world, _: world.set_width(world.gripper.open())),
    "close_gripper": command("Closed", lambda world, _: world.set_width(world.gripper.close())),
    "close_gripper_slow": command(
        "Closed", lambda world, _: world.set_width(world.gripper.close())
    ),
    "move_gripper": command("Moved Gripper", move_gripper),
    "activate_gripper": command("Activated", lambda world, _: world.gripper.activate()),
    "reset_gripper": command("Reset", lambda world, _: world.gripper.activate()),
    "set_load": command("Set Load", lambda world, body: body["mass"]),
}
NEEDS_JSON = ("pose", "update_param", "move_gripper", "set_load")


# ----------------------------------------------------------------------------------------------------------------------
# Routes that no robot has


def info(server: SimServer, _) -> dict:
    return {"clock": server.clock, "period": PERIOD, "tasks": list(TASKS)}


def reset(server: SimServer, body: dict) -> str:
    if body["task"] not in TASKS:
        raise KeyError(body["task"])
    server.do(lambda world: world.reset(body["task"], body["seed"]))
    return "Reset"


def look(server: SimServer, _) -> dict:
    return server.do(World.look)


def camera(server: SimServer, body: dict) -> tuple[np.ndarray, int, float]:
    return server.do(lambda world: world.image(body["name"], body["width"], body["height"]))


def fault(server: SimServer, body: dict) -> str:
    """Order {"kind": ..., "value": n}: n times, n seconds, or 1 for on. 0 ends it."""
    kind = body["kind"]
    value = body["value"]
    assert server.ordering and kind in FAULTS

    def order(world):
        world.faults.pop(kind, None)
        if not value:
            return
        if kind in ("reflex", "user_stop"):
            world.stopped = True
        if kind == "restart":
            world.restart_server()
        elif kind == "hang":
            world.faults[kind] = time.monotonic() + value
        elif kind != "reflex":
            world.faults[kind] = value

    server.do(order)
    return "Ordered"


SIM_ROUTES = {"info": info, "reset": reset, "look": look, "camera": camera, "fault": fault}


# ----------------------------------------------------------------------------------------------------------------------
# HTTP


class Handler(BaseHTTPRequestHandler):
    """Answers as Flask does: POST only, and 404, 405, 415, 400 and 500 with a body of HTML."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    timeout = None

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        folder, _, name = self.path.strip("/").rpartition("/")
        route = {"": ROUTES, "sim": SIM_ROUTES}.get(folder, {}).get(name)
        if route is None:
            return self.send_html(404, "Not Found")
        if folder == "" and self.misbehave(name):
            return None
        body = None
        if name in NEEDS_JSON or (folder == "sim" and raw):
            if self.headers.get_content_type() != "application/json":
                return self.send_html(415, "Unsupported Media Type")
            try:
                body = json.loads(raw)
            except ValueError:
                return self.send_html(400, "Bad Request")
        try:
            answer = route(self.server, body)
        except UserError as error:  # this machine cannot render
            return self.send_html(500, str(error))
        except Exception:  # noqa: BLE001  as in Flask
            return self.send_html(500, "Internal Server Error")
        if isinstance(answer, dict):
            return self.send(200, "application/json", json.dumps(answer).encode())
        if isinstance(answer, str):
            return self.send(200, "text/html; charset=utf-8", answer.encode())
        image, number, age = answer
        headers = {"X-Number": number, "X-Age": age}
        return self.send(200, "application/octet-stream", image.tobytes(), headers)

    def misbehave(self, name: str) -> bool:
        """Apply the ordered faults. Return whether the request has been answered."""
        world = self.server.world
        if "hang" in world.faults:
            time.sleep(max(0.0, world.faults["hang"] - time.monotonic()))
        if world.use_fault("drop"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return True
        if world.use_fault("error") or (name.startswith("get") and world.use_fault("no_state")):
            self.send_html(500, "Internal Server Error")
            return True
        return False

    def do_GET(self):
        if self.path.strip("/") in ROUTES:
            self.send_html(405, "Method Not Allowed")
        else:
            self.send_html(404, "Not Found")

    do_PUT = do_DELETE = do_HEAD = do_GET

    def send_html(self, code: int, title: str) -> None:
        body = f"<!doctype html>\n<title>{code} {title}</title>".encode()
        self.send(code, "text/html; charset=utf-8", body, reason=title)

    def send(
        self,
        code: int,
        kind: str,
        body: bytes,
        headers: dict | None = None,
        reason: str | None = None,
    ) -> None:
        self.send_response(code, reason)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": len(body),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass
