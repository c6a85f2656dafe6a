"""Pictures of the studio for the README, made in a real browser.

    python benchmarks/screenshots.py --out docs

Needs Chromium on the PATH and the packages of `interactdiff[dev]`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from browser import StudioPage, opened_browser, served_studio

SHOTS = {
    "studio": {"viewport": {"width": 1280, "height": 800}},
    "studio_dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "studio_phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    with served_studio() as (address, _), opened_browser() as browser:
        for name, options in SHOTS.items():
            context = browser.new_context(**options)
            studio = StudioPage(context.new_page(), address)
            page = studio.page
            page.get_by_role("button", name="two at once").click()
            studio.tag("riding").wait_for()
            studio.expect("seed", "5")
            page.locator("#lock input").check()
            studio.generate()
            if name == "studio":
                page.locator("#view label", has_text="Detections").click()
                page.locator("#note", has_text="riding 0.").wait_for()
            page.evaluate("() => scrollTo(0, 0)")
            page.wait_for_timeout(500)
            page.screenshot(path=args.out / f"{name}.png")
            print(args.out / f"{name}.png")
            context.close()


if __name__ == "__main__":
    main()
