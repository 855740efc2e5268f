"""Training: options, loop, checkpoints, run folders, teachers, and measuring what came out."""
