"""Text encoders that are freed, and images that become latents: against what pipelines compute themselves."""

from __future__ import annotations

import gc
import shutil
import weakref

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.interop.pipelines import load_pipeline, truncated
from distmatch.interop.pipelines.tail import trace_tail
from distmatch.interop.pipelines.text_parts import Recorded, text_modules
from tests.helpers.pipelines import SIZE, diffusers, save

# Those that encode prompts, or scale and pack latents, each in another way; all 16 were tried.
WITH_TEXT = ("stable-diffusion", "stable-diffusion-3", "flux", "hunyuan-dit", "z-image", "ltx")
FAMILIES = ("stable-diffusion", "stable-diffusion-3", "flux", "sana", "qwen-image", "wan", "ltx", "cogvideox")
PROMPTS = ["a red cat", "the small green dog runs"]
LONG = "a small red cat runs under the large blue tree in the green house by the river " * 4


@pytest.mark.parametrize("name", WITH_TEXT)
def test_what_needs_no_prompt_goes_on_without_text_encoders(teacher_of, name):
    teacher = teacher_of(name)
    pipeline = teacher.pipeline
    told, null, grid = pipeline.encode(PROMPTS), teacher.null_conditioning(1), pipeline.grid(3)
    z = torch.randn(3, *teacher.shape, generator=torch.Generator().manual_seed(0))
    images, fingerprint = teacher.decoder.decode(z), pipeline.fingerprint
    parts = [weakref.ref(part) for part in text_modules(pipeline.tracer.pipeline).values()]
    assert parts
    pipeline.free_text_encoders()
    gc.collect()
    assert all(part() is None for part in parts)  # nothing else holds them
    assert not text_modules(pipeline.tracer.pipeline)
    # The recorded encodings have the place in memory of their own, which may change last bits.
    assert (teacher.decoder.decode(z) - images).abs().max() < 1e-5
    assert torch.equal(pipeline.grid(3), grid)
    assert pipeline.fingerprint == fingerprint
    empty = pipeline.encode([""])
    torch.testing.assert_close(dict(empty), dict(null), rtol=0, atol=1e-5)
    assert not text_modules(pipeline.tracer.pipeline)
    again = pipeline.encode(PROMPTS)  # loads them again
    assert text_modules(pipeline.tracer.pipeline)
    torch.testing.assert_close(dict(again), dict(told), rtol=0, atol=1e-5)


def test_text_encoders_that_are_gone_or_changed(tmp_path):
    folder = save("stable-diffusion", tmp_path)
    pipeline = load_pipeline(folder, **SIZE["stable-diffusion"]).pipeline
    pipeline.free_text_encoders()
    other = save("stable-diffusion", tmp_path / "other", seed=1)
    shutil.move(folder / "text_encoder", tmp_path / "kept")
    shutil.copytree(other / "text_encoder", folder / "text_encoder")
    with pytest.raises(UserError, match="has changed since"):
        pipeline.encode(PROMPTS)
    pipeline.free_text_encoders()
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"freed.*--encode live"):
        pipeline.encode(PROMPTS)


def test_encoders_that_cannot_be_recorded_stay(teacher_of):
    pipeline = teacher_of("stable-diffusion").pipeline.tracer.pipeline
    with pytest.raises(UserError, match="cannot be freed"):
        Recorded(pipeline, lambda n: None)
    with pytest.raises(UserError, match="does not grow"):
        Recorded(pipeline, lambda n: pipeline.encode_prompt(["a"] * (3 * n - 2), "cpu", 1, False))


@pytest.mark.parametrize("name", ["stable-diffusion-3", "wan"])
def test_prompts_that_are_cut_off_are_counted(teacher_of, name):
    pipeline, limit = teacher_of(name).pipeline, 12
    with pytest.warns(UserWarning, match=rf"1 of 3 prompts is longer than the {limit} tokens of tokenizer"):
        pipeline.encode([PROMPTS[0], LONG, PROMPTS[1]])
    found = {}
    pipeline.encode([*PROMPTS, LONG], truncated=found)
    assert found[f"{limit} tokens of tokenizer"] == {2}
    assert len(found) == (3 if name == "stable-diffusion-3" else 1)


@pytest.mark.parametrize("name", [*WITH_TEXT, "qwen-image"])
def test_tokens_are_counted_without_encoding(teacher_of, name, monkeypatch):
    """As while the prompts are encoded, also of several tokenizers and in several parts."""
    pipeline, encoded = teacher_of(name).pipeline, {}
    prompts = [PROMPTS[0], 4 * LONG, PROMPTS[1], " ".join(LONG.split()[:14]), LONG]
    for i, prompt in enumerate(prompts):  # one by one, as some pad to the longest
        here = {}
        pipeline.encode([prompt], truncated=here)
        for limit in here:
            encoded.setdefault(limit, set()).add(i)
    rows = []
    for kind in {type(part) for part in text_modules(pipeline.tracer.pipeline).values()}:

        def forward(self, *args, own=kind.forward, **named):
            rows.append(len((*args, *named.values())[0]))
            return own(self, *args, **named)

        monkeypatch.setattr(kind, "forward", forward)
    monkeypatch.setattr(truncated, "_MOST", 2)
    assert pipeline.truncated(prompts) == encoded
    assert encoded
    assert set(rows) == {1}  # the empty prompt


def test_prompts_that_a_pipeline_itself_cuts_off_are_counted(teacher_of):
    """QwenImage keeps max_sequence_length tokens of an encoding, of more that its tokenizer makes."""
    pipeline = teacher_of("qwen-image").pipeline
    own, most = pipeline.tracer.pipeline, SIZE["qwen-image"]["max_sequence_length"]
    words = LONG.split()
    for n in (1, 5, 20, 40, 60, 68):
        whole = own.encode_prompt(" ".join(words[:n]), "cpu", max_sequence_length=10_000)[0].shape[1]
        found = {}
        pipeline.encode([" ".join(words[:n])], truncated=found)
        assert found.get(f"{most} tokens of max_sequence_length") == ({0} if whole > most else None)
    assert own.encode_prompt(LONG, "cpu", max_sequence_length=10_000)[0].shape[1] > most  # both occur
    with pytest.warns(UserWarning, match=f"1 of 2 prompts is longer than the {most} tokens of max_seq"):
        pipeline.encode([PROMPTS[0], LONG])


def encoded_by_hand(teacher, x):
    """The mean latents of images by the autoencoder itself, and what it decodes them to."""
    vae, video = teacher.pipeline.tracer.pipeline.vae, len(teacher.pipeline.tail.image) == 4
    images = x[:, :, None] if video and x.ndim == 4 else x
    found = vae.encode(images)
    u = found.latent_dist.mean if hasattr(found, "latent_dist") else found.latent
    decoded = vae.decode(u, None) if isinstance(vae, diffusers.AutoencoderKLLTXVideo) else vae.decode(u)
    return u, decoded.sample.reshape(x.shape)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_images_go_there_and_back(teacher_of, name):
    teacher = teacher_of(name)
    x = torch.rand(2, *teacher.decoder.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = teacher.decoder.encode(x)
    assert z.shape == (2, *teacher.shape)
    _, theirs = encoded_by_hand(teacher, x)
    assert (teacher.decoder.decode(z) - theirs.clamp(-1, 1)).abs().max() < 1e-5
    if name != "sana":  # whose autoencoder has no Gaussian
        noise = torch.randn_like(z)
        drawn = teacher.decoder.encode(x, noise)
        tail = teacher.pipeline.tail
        posterior = tail.vae.encode(x.reshape(2, *tail.image)).latent_dist
        assert (drawn - z).abs().max() > 1e-3
        # The spread in the teacher's space is that of the autoencoder, scaled in the same way.
        spread = ((drawn - z) / noise).flatten(1)[:, tail.order] * tail.scale
        torch.testing.assert_close(spread, posterior.std.flatten(1), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_latents_are_those_of_the_families_own_code(teacher_of):
    """How the image-to-image pipelines of diffusers scale, shift and pack what the autoencoder gives them."""

    def latents(name):
        teacher = teacher_of(name)
        x = torch.rand(2, *teacher.decoder.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
        return teacher.decoder.encode(x), encoded_by_hand(teacher, x)[0], teacher.pipeline.tracer.pipeline

    def moments(pipe):
        both = (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        return [torch.tensor(values).view(1, -1, 1, 1, 1) for values in both]

    z, u, pipe = latents("stable-diffusion")
    torch.testing.assert_close(z, u * pipe.vae.config.scaling_factor)
    z, u, pipe = latents("stable-diffusion-3")
    torch.testing.assert_close(z, (u - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)
    z, u, pipe = latents("flux")
    scaled = (u - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(z, pipe._pack_latents(scaled, 2, 4, 8, 8), rtol=1e-5, atol=1e-6)
    z, u, pipe = latents("qwen-image")
    mean, std = moments(pipe)
    torch.testing.assert_close(z, pipe._pack_latents((u - mean) / std, 2, 4, 4, 4), rtol=1e-5, atol=1e-6)
    z, u, pipe = latents("wan")
    mean, std = moments(pipe)
    torch.testing.assert_close(z, (u - mean) / std, rtol=1e-5, atol=1e-6)
    z, u, pipe = latents("cogvideox")
    torch.testing.assert_close(z, u.transpose(1, 2) * pipe.vae.config.scaling_factor)


ENDS = {
    "that do not arrive": lambda z: z * (torch.arange(z[0].numel()) != 3).float().reshape(z[0].shape),
    "arrive twice": lambda z: z[:, [0, 0, 2, 3]],
    "from a scaling": lambda z: z**3,
    "its autoencoder, from": lambda z: z[:, :, ::2],
}


@pytest.mark.parametrize("words", ENDS)
def test_another_end_is_refused_with_what_was_seen(teacher_of, words):
    teacher = teacher_of("stable-diffusion")
    pipeline, shape = teacher.pipeline.tracer.pipeline, teacher.shape

    def end(z):
        return 2 * pipeline.vae.decode(ENDS[words](z), return_dict=False)[0] - 1

    with pytest.raises(UserError, match=words):
        trace_tail(pipeline, end, shape, torch.float32)


def test_images_that_are_changed_after_the_autoencoder_are_refused(teacher_of):
    teacher = teacher_of("stable-diffusion")
    pipeline = teacher.pipeline.tracer.pipeline
    with pytest.raises(UserError, match="from what its autoencoder returns"):
        trace_tail(pipeline, lambda z: pipeline.vae.decode(z).sample.flip(3), teacher.shape, torch.float32)
