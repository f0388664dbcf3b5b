"""The MuJoCo model: the arm, the table and one object.

The arm has Franka's kinematics and the meshes that gymnasium-robotics installs.
"""

import math
from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np

from robot.limits import JOINT_LIMITS
from robot.sim.objects import CAMERAS, Object

TICK = 0.002  # s, one physics step
Q_MIN, Q_MAX = JOINT_LIMITS["panda"]
# position (m) and quaternion (not normalized) in the link before, mass (kg): franka_description's
# frames
LINKS = (
    ((0, 0, 0.333), (1, 0, 0, 0), 4.97),
    ((0, 0, 0), (1, -1, 0, 0), 0.65),
    ((0, -0.316, 0), (1, 1, 0, 0), 3.23),
    ((0.0825, 0, 0), (1, 1, 0, 0), 3.59),
    ((-0.0825, 0.384, 0), (1, -1, 0, 0), 1.23),
    ((0, 0, 0), (1, 1, 0, 0), 1.67),
    ((0.088, 0, 0), (1, 1, 0, 0), 0.74),
)
# Convex hulls of the links, 200 faces each.
MESHES = "envs/assets/kitchen_franka/franka_assets/meshes/collision"
# Group 3 is not drawn.
FINGER_PAD = {"mass": 0.001, "condim": 4, "friction": (0.6, 0.02, 0.001), "group": 3}
OBJECT_MATERIAL = {"density": 250, "condim": 6, "friction": (0.6, 0.01, 0.002)}  # kg/m3


def build_model(obj: Object) -> mujoco.MjModel:
    """Return the compiled model of the scene with this object."""
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    spec.option.timestep = TICK
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10  # otherwise a grasped object slowly slips
    spec.visual.headlight.ambient = (0.45,) * 3
    spec.visual.headlight.diffuse = (0.45,) * 3
    meshes = Path(find_spec("gymnasium_robotics").origin).parent / MESHES
    for name in [*(f"link{i}" for i in range(8)), "hand", "finger"]:
        spec.add_mesh(name=name, file=str(meshes / f"{name}.stl"))

    world = spec.worldbody
    world.add_light(pos=(0.4, -0.6, 1.5), dir=(0, 0.4, -1), diffuse=(0.45,) * 3, specular=(0, 0, 0))
    add_box(world, (0.5, 0, -0.02), (0.4, 0.6, 0.02), (0.62, 0.6, 0.56))  # the table
    add_box(world, (0, 0, -0.7), (3, 3, 0.01), (0.3, 0.32, 0.36))  # the floor
    add_mesh(world, "link0", 0.9)
    hand = add_arm(world)
    add_fingers(spec, hand)
    add_wrist_camera(hand)

    body = world.add_body(name="object")
    body.add_freejoint()
    for primitive, rgb, size, pos in obj.parts:
        shape = getattr(mujoco.mjtGeom, f"mjGEOM_{primitive.upper()}")
        body.add_geom(
            type=shape, size=(*size, 0, 0)[:3], pos=pos, rgba=(*rgb, 1), **OBJECT_MATERIAL
        )
    return spec.compile()


def add_box(body: mujoco.MjsBody, pos: tuple, size: tuple, rgb: tuple, **options) -> None:
    body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=pos, size=size, rgba=(*rgb, 1), **options)


def add_mesh(
    body: mujoco.MjsBody, name: str, shade: float, solid: bool = False, mass: float = 0.0
) -> None:
    """Add a grey mesh. solid: it collides."""
    touch = {"contype": int(solid), "conaffinity": int(solid)}
    rgba = (shade, shade, shade, 1)
    body.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname=name, rgba=rgba, mass=mass, **touch)


def add_arm(world: mujoco.MjsBody) -> mujoco.MjsBody:
    """Add the seven links and the hand. Return the hand."""
    body = world
    for i, (pos, quat, mass) in enumerate(LINKS):
        body = body.add_body(
            name=f"link{i + 1}", pos=pos, quat=np.array(quat) / np.linalg.norm(quat)
        )
        body.add_joint(
            axis=(0, 0, 1), range=(Q_MIN[i], Q_MAX[i]), limited=True, armature=0.1, damping=0.5
        )
        add_mesh(body, f"link{i + 1}", 0.9, mass=mass)
    hand = body.add_body(
        name="hand", pos=(0, 0, 0.107), quat=(math.cos(math.pi / 8), 0, 0, -math.sin(math.pi / 8))
    )
    add_mesh(hand, "hand", 0.9, solid=True, mass=0.73)
    hand.add_site(name="tcp", pos=(0, 0, 0.1034), group=4)
    return hand


def add_fingers(spec: mujoco.MjSpec, hand: mujoco.MjsBody) -> None:
    """Add two fingers that move together."""
    slide = {
        "type": mujoco.mjtJoint.mjJNT_SLIDE,
        "axis": (0, 1, 0),
        "range": (0, 0.04),
        "limited": True,
        "armature": 0.1,
        "damping": 30,
    }
    for name, quat in (("left", (1, 0, 0, 0)), ("right", (0, 0, 0, 1))):
        finger = hand.add_body(name=name, pos=(0, 0, 0.0584), quat=quat)
        finger.add_joint(name=name, **slide)
        add_mesh(finger, "finger", 0.25, mass=0.015)
        add_box(finger, (0, 0.009, 0.043), (0.0105, 0.009, 0.0105), (1, 1, 1), **FINGER_PAD)
    joints = {"type": mujoco.mjtEq.mjEQ_JOINT, "objtype": mujoco.mjtObj.mjOBJ_JOINT}
    spec.add_equality(name1="left", name2="right", data=[0, 1, *[0] * 9], **joints)


def add_wrist_camera(hand: mujoco.MjsBody) -> None:
    """Add the wrist camera. Its x axis is the hand's y axis, along which the fingers move."""
    camera = CAMERAS["wrist"]
    x = np.array([0.0, 1.0, 0.0])
    back = np.subtract(camera["pos"], camera["lookat"])  # a camera looks along its -z axis
    back = back / np.linalg.norm(back)
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.stack([x, np.cross(back, x), back], axis=1).ravel())
    hand.add_camera(name="wrist", pos=camera["pos"], quat=quat, fovy=camera["fovy"])
