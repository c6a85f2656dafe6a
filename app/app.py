"""The studio as a Hugging Face Space: `demo` is the page. On one's own machine: `interactdiff app`."""

from interactdiff.app.serve import LAUNCH, PUBLIC, leave_on_sigterm, make_studio

studio = make_studio(PUBLIC)
demo = studio.blocks

if __name__ == "__main__":
    leave_on_sigterm()
    try:
        demo.launch(**LAUNCH)
    finally:
        studio.worker.close()
