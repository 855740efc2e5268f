"""What every room may use: user errors, estimates, safe files, seeded streams. Imports nothing of ours."""
