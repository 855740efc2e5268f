"""Models from and for elsewhere: teachers of diffusers, EDM and EDM2; students for diffusers and ONNX."""

from distmatch.diffusion.latents import Decoder, decode_samples, decoder_of
from distmatch.interop.conversion import Conversion, check_conversion
from distmatch.interop.diffusers_export import export_diffusers
from distmatch.interop.diffusers_teacher import check_teacher, load_diffusers, teacher_from
from distmatch.interop.edm_checkpoint import read_edm
from distmatch.interop.latents import VAEDecoder
from distmatch.interop.onnx_export import export_onnx
from distmatch.interop.own_modules import HandedIn, check_storable, copied_module
from distmatch.interop.pipelines import export_lora, export_pipeline, load_folder, load_pipeline
from distmatch.interop.saved import convert_edm, is_external, load_denoiser, load_external, save_denoiser

__all__ = [
    "Conversion",
    "Decoder",
    "HandedIn",
    "VAEDecoder",
    "check_conversion",
    "check_storable",
    "check_teacher",
    "convert_edm",
    "copied_module",
    "decode_samples",
    "decoder_of",
    "export_diffusers",
    "export_lora",
    "export_onnx",
    "export_pipeline",
    "is_external",
    "load_denoiser",
    "load_diffusers",
    "load_external",
    "load_folder",
    "load_pipeline",
    "read_edm",
    "save_denoiser",
    "teacher_from",
]
