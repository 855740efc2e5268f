"""The page and the pictures of a run, made from the files of its run folder alone."""

from distmatch.report.build import build_report
from distmatch.report.follow import follow_report
from distmatch.report.grid import grid_png, image_grid, save_grid
from distmatch.report.log import curves, read_log

__all__ = ["build_report", "curves", "follow_report", "grid_png", "image_grid", "read_log", "save_grid"]
