"""Scenes that fill the canvas with one click; of the embedded world."""

from interactdiff.commands.demo import DEMO
from interactdiff.scene import Interaction, Scene

EXAMPLES = {
    "riding": DEMO,
    "balancing": Scene(
        "a person in purple balancing a green ball on the street",
        (
            Interaction(
                "person in purple",
                "balancing",
                "green ball",
                (0.3, 0.33, 0.66, 0.97),
                (0.35, 0.03, 0.61, 0.35),
            ),
        ),
        seed=3,
    ),
    "two at once": Scene(
        "a person in yellow riding a red car and a person in blue carrying an orange box in the park",
        (
            Interaction(
                "person in yellow", "riding", "red car", (0.12, 0.12, 0.44, 0.66), (0.03, 0.57, 0.5, 0.92)
            ),
            Interaction(
                "person in blue", "carrying", "orange box", (0.7, 0.35, 0.96, 0.92), (0.55, 0.5, 0.78, 0.72)
            ),
        ),
        seed=5,
    ),
}
