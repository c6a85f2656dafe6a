"""The studio as a Hugging Face Space: `demo` is the page. On one's own machine: `interactdiff app`."""

from interactdiff.app.serve import LAUNCH, PUBLIC, make_studio

demo = make_studio(PUBLIC).blocks

if __name__ == "__main__":
    demo.launch(**LAUNCH)
