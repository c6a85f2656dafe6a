"""Body poses, one an action: joints in the person's own box, facing right, x and y in [0, 1] downwards.

Each pose reaches all four sides of its box, so that fitting a pose to a box hardly distorts it.
"""

from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Pose:
    """Joints of a body; limbs are (root, joint, end) with the root on the torso.

    `near` limbs are drawn in front of the torso, `far` limbs behind it. `prop` is "rope", "bowl" or None.
    """

    head: Point
    neck: Point
    hip: Point
    far_arm: tuple[Point, Point]
    near_arm: tuple[Point, Point]
    far_leg: tuple[Point, Point]
    near_leg: tuple[Point, Point]
    prop: str | None = None


IDLE = Pose(
    head=(0.50, 0.12),
    neck=(0.50, 0.26),
    hip=(0.50, 0.60),
    far_arm=((0.74, 0.42), (0.90, 0.58)),
    near_arm=((0.26, 0.42), (0.10, 0.58)),
    far_leg=((0.60, 0.80), (0.64, 0.97)),
    near_leg=((0.40, 0.80), (0.36, 0.97)),
)
"""Of a person who does nothing to anything."""
POSES: dict[str, Pose] = {
    # beside: the object stands on the ground in front of the person
    "kicking": Pose(
        head=(0.30, 0.12),
        neck=(0.33, 0.25),
        hip=(0.40, 0.57),
        far_arm=((0.56, 0.34), (0.72, 0.22)),
        near_arm=((0.14, 0.36), (0.02, 0.22)),
        far_leg=((0.36, 0.78), (0.30, 0.97)),
        near_leg=((0.70, 0.66), (0.98, 0.74)),
    ),
    "pushing": Pose(
        head=(0.66, 0.12),
        neck=(0.58, 0.26),
        hip=(0.32, 0.58),
        far_arm=((0.80, 0.42), (0.98, 0.50)),
        near_arm=((0.76, 0.52), (0.98, 0.66)),
        far_leg=((0.50, 0.78), (0.42, 0.97)),
        near_leg=((0.18, 0.78), (0.03, 0.97)),
    ),
    "pulling": Pose(
        head=(0.14, 0.12),
        neck=(0.20, 0.26),
        hip=(0.24, 0.62),
        far_arm=((0.42, 0.42), (0.64, 0.50)),
        near_arm=((0.38, 0.46), (0.60, 0.54)),
        far_leg=((0.52, 0.74), (0.72, 0.97)),
        near_leg=((0.44, 0.80), (0.52, 0.97)),
        prop="rope",
    ),
    "feeding": Pose(
        head=(0.40, 0.12),
        neck=(0.36, 0.26),
        hip=(0.30, 0.60),
        far_arm=((0.16, 0.42), (0.02, 0.54)),
        near_arm=((0.58, 0.36), (0.80, 0.34)),
        far_leg=((0.20, 0.80), (0.22, 0.97)),
        near_leg=((0.38, 0.80), (0.36, 0.97)),
        prop="bowl",
    ),
    # atop: the object is below the person
    "riding": Pose(
        head=(0.34, 0.14),
        neck=(0.30, 0.32),
        hip=(0.20, 0.76),
        far_arm=((0.54, 0.50), (0.80, 0.54)),
        near_arm=((0.50, 0.58), (0.76, 0.62)),
        far_leg=((0.66, 0.70), (0.88, 0.94)),
        near_leg=((0.58, 0.76), (0.72, 0.97)),
    ),
    "standing on": Pose(
        head=(0.50, 0.12),
        neck=(0.50, 0.26),
        hip=(0.50, 0.58),
        far_arm=((0.74, 0.26), (0.97, 0.16)),
        near_arm=((0.26, 0.26), (0.03, 0.16)),
        far_leg=((0.58, 0.78), (0.64, 0.97)),
        near_leg=((0.42, 0.78), (0.36, 0.97)),
    ),
    # overhead: the object is above the person
    "lifting": Pose(
        head=(0.50, 0.30),
        neck=(0.50, 0.43),
        hip=(0.50, 0.68),
        far_arm=((0.80, 0.30), (0.78, 0.03)),
        near_arm=((0.20, 0.30), (0.22, 0.03)),
        far_leg=((0.84, 0.76), (0.94, 0.97)),
        near_leg=((0.16, 0.76), (0.06, 0.97)),
    ),
    "balancing": Pose(
        head=(0.50, 0.12),
        neck=(0.50, 0.26),
        hip=(0.50, 0.60),
        far_arm=((0.76, 0.34), (0.97, 0.40)),
        near_arm=((0.24, 0.34), (0.03, 0.40)),
        far_leg=((0.55, 0.80), (0.56, 0.97)),
        near_leg=((0.45, 0.80), (0.44, 0.97)),
    ),
    # at hand: the object is at chest height in front of the person
    "carrying": Pose(
        head=(0.30, 0.12),
        neck=(0.28, 0.26),
        hip=(0.26, 0.60),
        far_arm=((0.40, 0.58), (0.96, 0.60)),
        near_arm=((0.34, 0.64), (0.92, 0.66)),
        far_leg=((0.46, 0.76), (0.52, 0.97)),
        near_leg=((0.14, 0.78), (0.05, 0.97)),
    ),
    "hitting": Pose(
        head=(0.42, 0.12),
        neck=(0.40, 0.28),
        hip=(0.34, 0.60),
        far_arm=((0.16, 0.34), (0.05, 0.14)),
        near_arm=((0.66, 0.36), (0.97, 0.44)),
        far_leg=((0.66, 0.76), (0.84, 0.97)),
        near_leg=((0.14, 0.80), (0.05, 0.97)),
    ),
}
