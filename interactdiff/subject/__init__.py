"""DreamTuner (arXiv 2312.13691): this very subject, from one picture. docs/subject.md."""
