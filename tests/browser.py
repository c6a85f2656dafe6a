"""A real browser for the studio's tests and screenshots: Debian's or whichever Chromium is on the PATH."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)
QUIET += ("--disable-component-update", "--disable-sync")


@contextmanager
def served_studio(*flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of `interactdiff app` in a process of its own, in an empty folder, and the process."""
    with tempfile.TemporaryDirectory() as empty:
        process = subprocess.Popen(
            [sys.executable, "-m", "interactdiff", "app", "--device", "cpu", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=empty,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            yield (
                next(word for line in process.stdout for word in line.split() if "http" in word) + "/",
                process,
            )
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def opened_browser() -> Iterator[Any]:
    """Chromium, without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


class StudioPage:
    """The studio in a tab.

    Attributes:
        problems: what the console called an error.
    """

    def __init__(self, page: Page, address: str):
        self.page, self.problems = page, list[str]()
        page.set_default_timeout(60_000)
        page.on("console", lambda said: said.type == "error" and self.problems.append(said.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.goto(address)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Until the whole page stands, and the canvas's script has run."""
        for part in ("#open button", "footer", "#canvas [data-do=undo]:disabled"):
            self.page.locator(part).first.wait_for()

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a place on the canvas."""
        frame = self.page.locator("#canvas .stage").bounding_box()
        assert frame is not None
        return frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """With the mouse, from one place on the canvas to another."""
        mouse = self.page.mouse
        mouse.move(*self.at(*start))
        mouse.down()
        mouse.move(*self.at(*((a + b) / 2 for a, b in zip(start, end, strict=True))))
        mouse.move(*self.at(*end))
        mouse.up()

    def draw_box(self, start: tuple[float, float], end: tuple[float, float], name: str) -> None:
        """Drag a box and type its name."""
        self.drag(start, end)
        self.page.keyboard.type(name)
        self.page.keyboard.press("Enter")
        self.page.keyboard.press("Escape")

    def link(self, subject: str, onto: tuple[float, float], action: str) -> None:
        """Drag a box's arrow to a place on another box, and type the action."""
        self.tag(subject).click()
        arrow = self.page.locator("#canvas .linker").bounding_box()
        assert arrow is not None
        mouse = self.page.mouse
        mouse.move(arrow["x"] + arrow["width"] / 2, arrow["y"] + arrow["height"] / 2)
        mouse.down()
        mouse.move(*self.at(*onto), steps=4)
        mouse.up()
        self.page.keyboard.type(action)
        self.page.keyboard.press("Enter")

    def tag(self, text: str) -> Any:
        """A name or an action on the canvas."""
        return self.page.locator("#canvas .tag", has_text=text)

    def tags(self) -> list[str]:
        """All of them, in alphabetical order."""
        return sorted(self.page.locator("#canvas .tag").all_inner_texts())

    def value(self, name: str) -> str:
        """What stands in a field."""
        return self.page.locator(f"#{name} textarea, #{name} input").first.input_value()

    def expect(self, name: str, value: str) -> None:
        """Wait until that stands in a field."""
        script = (
            "([name, value]) => document.querySelector(`#${name} textarea, #${name} input`)?.value === value"
        )
        self.page.wait_for_function(script, arg=[name, value])

    def fill(self, name: str, value: str) -> Any:
        """Write into a field until it stays: what has just been unfolded may be filled in by Gradio later."""
        field = self.page.locator(f"#{name} textarea, #{name} input").first
        for _ in range(20):
            field.fill(value)
            self.page.wait_for_timeout(300)
            if field.input_value() == value:
                break
        return field

    def open_panel(self, name: str) -> None:
        """Unfold what is folded."""
        self.page.locator(f"#{name} > button").click()

    def generate(self) -> None:
        """Draw, and wait for the pictures."""
        self.page.locator("#generate").click()
        self.page.locator("#status", has_text=" generated, ").wait_for()
        self.page.locator("#gallery img").first.wait_for()
