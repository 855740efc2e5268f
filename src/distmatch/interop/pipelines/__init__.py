"""Pipelines of diffusers as teachers: what a pipeline does with its network is traced, not programmed."""

from distmatch.interop.pipelines.loading import needs_tracing
from distmatch.interop.pipelines.teacher import load_pipeline

__all__ = ["load_pipeline", "needs_tracing"]
