"""Distillation: the student, the objectives, and the methods as `init` and `step` on an explicit state."""
