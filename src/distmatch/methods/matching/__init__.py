"""Two networks: a student, and a fake score that tracks it; methods differ in the student's gradient."""
