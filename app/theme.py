"""Theme, styles and small pieces of HTML of the page."""

import html

import gradio as gr

THEME = gr.themes.Base(
    primary_hue="indigo",
    secondary_hue="slate",
    neutral_hue="slate",
    radius_size="md",
    spacing_size="md",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)

CSS = """
.gradio-container { max-width: 1320px !important; width: 100%; margin: 0 auto !important; }
.gradio-container > main { width: 100%; max-width: none; }
#title h1 { margin: 0; font-size: 22px; }
#title p { margin: 0; color: var(--body-text-color-subdued); }
.error { border-left: 3px solid #d03050; padding: 2px 10px; }
.error p { margin: 0; color: #c02040; }
.error .error { border: 0; padding: 0; }
.dark .error p { color: #ff8fa3; }
#gallery img, #preview img { image-rendering: pixelated; }
#status { min-height: 44px; }
:is(#status, #learn-status) .track {
  height: 6px; border-radius: 3px; overflow: hidden; background: var(--border-color-primary);
}
:is(#status, #learn-status) .done { height: 100%; background: var(--color-accent); transition: width 0.2s; }
:is(#status, #learn-status) p { margin: 4px 0 0; color: var(--body-text-color-subdued); font-size: 14px; }
#lock { min-width: 90px; }
#hint, #open p { color: var(--body-text-color-subdued); }
body.dropping::after {
  content: "Drop a picture or a scene"; position: fixed; inset: 12px; z-index: 1000; pointer-events: none;
  display: grid; place-items: center; border: 3px dashed var(--color-accent); border-radius: 16px;
  font: 600 24px system-ui, sans-serif; color: var(--body-text-color);
  background: color-mix(in srgb, var(--background-fill-primary) 60%, transparent);
}
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } }
"""

# A file that is dropped anywhere on the page goes to the field for files, unless a field of its own is there.
DROP = """
() => {
  let depth = 0;
  const own = (event) => event.target.closest && event.target.closest('.takes-files');
  const files = (event) => event.dataTransfer && [...event.dataTransfer.types].includes('Files');
  document.addEventListener('dragenter', (event) => {
    if (files(event) && ++depth) document.body.classList.add('dropping');
  });
  document.addEventListener('dragleave', (event) => {
    if (files(event) && --depth <= 0) { depth = 0; document.body.classList.remove('dropping'); }
  });
  document.addEventListener('dragover', (event) => {
    if (!files(event)) return;
    event.preventDefault();
    document.body.classList.toggle('dropping', !own(event));
  });
  document.addEventListener('drop', (event) => {
    depth = 0;
    document.body.classList.remove('dropping');
    if (!files(event) || !event.dataTransfer.files.length || own(event)) return;
    event.preventDefault();
    const input = document.querySelector('#open input[type="file"]');
    if (!input) return;
    const one = new DataTransfer();
    one.items.add(event.dataTransfer.files[0]);
    input.files = one.files;
    input.dispatchEvent(new Event('change', { bubbles: true }));
  });
}
"""


def error_html(message: str) -> str:
    """A message beside a field: text alone, whatever is quoted in it."""
    return f"<p>{html.escape(message)}</p>"


def progress_html(message: str, fraction: float | None = None, seconds_left: float | None = None) -> str:
    """A line about what is going on, under a progress bar if there is a fraction of it."""
    if seconds_left is not None and 0.0 < (fraction or 0) < 1:
        message += f" · {seconds_left:.0f} s left" if seconds_left >= 1 else " · nearly done"
    track = ""
    if fraction is not None:
        track = f'<div class="track"><div class="done" style="width: {100 * fraction:.0f}%"></div></div>'
    return f"{track}<p>{html.escape(message)}</p>"
