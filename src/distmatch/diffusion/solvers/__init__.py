"""Samplers for any denoiser on any grid of noise levels: ``solve`` and what it takes."""

from distmatch.diffusion.solvers.adaptive import RK45
from distmatch.diffusion.solvers.grids import GRIDS, default_grid, grid, snap_grid
from distmatch.diffusion.solvers.momentum import GHVB, HeavyBall
from distmatch.diffusion.solvers.multistep import IPNDM, Adams, DPMpp
from distmatch.diffusion.solvers.names import ALIASES, SOLVERS, find_solver
from distmatch.diffusion.solvers.onestep import DDIM, TABLEAUX, Heun, RhoRK
from distmatch.diffusion.solvers.run import Run, Solver
from distmatch.diffusion.solvers.solve import Solution, sample_teacher, solve
from distmatch.diffusion.solvers.stochastic import (
    DPMppSDE,
    EulerMaruyama,
    PredictorCorrector,
    ReverseDiffusion,
)
from distmatch.diffusion.solvers.unipc import UniPC

__all__ = [
    "ALIASES",
    "DDIM",
    "GHVB",
    "GRIDS",
    "IPNDM",
    "RK45",
    "SOLVERS",
    "TABLEAUX",
    "Adams",
    "DPMpp",
    "DPMppSDE",
    "EulerMaruyama",
    "HeavyBall",
    "Heun",
    "PredictorCorrector",
    "ReverseDiffusion",
    "RhoRK",
    "Run",
    "Solution",
    "Solver",
    "UniPC",
    "default_grid",
    "find_solver",
    "grid",
    "sample_teacher",
    "snap_grid",
    "solve",
]
