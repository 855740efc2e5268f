"""Teachers of diffusers: predictions, whole sampling loops and images agree with the package they come from.

The networks are random and in float64; diffusers keeps noise levels in float32, and 1e-5 is their rounding.
"""

import copy
import itertools

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import has_features
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.latents import Decoder, decode_samples, decoder_of
from distmatch.diffusion.paths import discrete_path
from distmatch.diffusion.solvers.solve import solve
from distmatch.interop.diffusers_teacher import (
    check_teacher,
    teacher_from,
)
from distmatch.interop.latents import VAEDecoder
from tests.helpers.diffusers_models import SCHEDULES, diffusers, dit, schedule, unet, vae
from tests.helpers.rounding import assert_same_but_for_rounding


@pytest.mark.parametrize("name", SCHEDULES)
def test_predictions_agree(name):
    classes = 3 if "v" in name else 0
    model = unet(num_class_embeds=classes or None).double()
    teacher = teacher_from(model, schedule(name))
    assert has_features(teacher)
    assert (teacher.shape, teacher.num_classes) == ((3, 8, 8), classes)
    found = check_teacher(teacher, points=16, seed=1)
    assert found.relative < 1e-5
    assert found.size > 0.5
    # In float32, as teachers are used.
    assert check_teacher(teacher.float(), points=16, tolerance=1e-4).points == 16


def test_a_wrong_path_is_noticed():
    teacher = teacher_from(unet(), schedule("ddpm eps"))
    other = schedule("ddpm eps", beta_end=0.03)
    teacher.path = discrete_path(other.alphas_cumprod.double())
    assert check_teacher(teacher).relative > 1e-2
    with pytest.raises(UserError, match="does not predict what the original predicts"):
        check_teacher(teacher, tolerance=1e-3)


@pytest.mark.parametrize("name", ["ddim sample", "ddpm v cosine", "ddpm eps"])
@torch.no_grad()
def test_a_whole_ddim_loop_agrees(name):
    model = unet().double()
    kind, options = SCHEDULES[name]
    ddim = diffusers.DDIMScheduler(**options, clip_sample=False)
    teacher = teacher_from(model, getattr(diffusers, kind)(**options))
    ddim.set_timesteps(10)
    x = start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in ddim.timesteps:
        x = ddim.step(model(x, t).sample, t, x).prev_sample
    grid = torch.cat([teacher.path.levels[ddim.timesteps], torch.zeros(1, dtype=torch.float64)])
    alpha = teacher.path.alpha(ddim.timesteps[:1].double())
    assert torch.allclose(solve(teacher, start / alpha, grid, "ddim").y, x, atol=1e-5, rtol=1e-5)
    pipeline = diffusers.DDIMPipeline(model, ddim)
    pipeline.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(0)
    image = pipeline(
        2, generator=seeded, num_inference_steps=10, output_type="np", use_clipped_model_output=False
    )
    ours = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert torch.allclose(torch.as_tensor(image.images), ours, atol=1e-5)


@torch.no_grad()
def test_a_whole_flow_loop_agrees():
    model = unet().double()
    flow = schedule("flow shifted")
    teacher = teacher_from(model, flow)
    flow.set_timesteps(8)
    # From 0.99, not from pure noise, which has no place in a frame that divides by alpha.
    times = flow.sigmas.double().clone()
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = start
    for t, after in itertools.pairwise(times[1:]):
        x = x + (after - t) * model(x, t * 500).sample
    grid = times[1:] / (1 - times[1:])
    assert torch.allclose(solve(teacher, start / (1 - times[1]), grid, "ddim").y, x, atol=1e-5)


@torch.no_grad()
def test_a_guided_latent_transformer_makes_the_images_of_its_pipeline(tmp_path):
    model, codec = dit(out_channels=8, num_embeds_ada_norm=1000).double(), vae().double()
    ddim = diffusers.DDIMScheduler(clip_sample=False)
    pipeline = diffusers.DiTPipeline(model, codec, ddim)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        [7, 500],
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=5,
        output_type="pt",
    ).images
    teacher = teacher_from(model, ddim, vae=codec)
    assert (teacher.shape, teacher.num_classes, teacher.sigma_data) == ((4, 8, 8), 1000, 1.0)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ddim.set_timesteps(5)
    grid = torch.cat([teacher.path.levels[ddim.timesteps], torch.zeros(1, dtype=torch.float64)])
    start = noise / teacher.path.alpha(ddim.timesteps[:1].double())
    guided = Guided(teacher, 3.0)
    z = solve(guided, start, grid, "ddim", conditioning=torch.tensor([7, 500])).y
    ours = (decode_samples(guided, z, batch=1) / 2 + 0.5).clamp(0, 1)
    assert ours.std() > 0.01
    # 1e-5: the decoder's inputs and outputs are float32.
    assert torch.allclose(ours, images.float(), atol=1e-5)
    # Without guidance the class counts too, and -1 is the null class.
    x, sigma = torch.randn(2, 4, 8, 8).double(), torch.full((2,), 2.0).double()
    none = teacher(x, sigma)
    assert torch.equal(none, teacher(x, sigma, torch.tensor([-1, -1])))
    assert torch.equal(none, teacher(x, sigma, torch.tensor([1000, 1000])))
    assert (none - teacher(x, sigma, torch.tensor([3, 4]))).abs().max() > 1e-4


def test_classes_without_a_null_class():
    x, sigma = torch.randn(2, 3, 8, 8), torch.ones(2)
    plain = teacher_from(unet(num_class_embeds=3), schedule("ddpm eps"))
    for conditioning in (None, torch.tensor([0, -1])):
        with pytest.raises(UserError, match="null_class"):
            plain(x, sigma, conditioning)
    named = teacher_from(unet(num_class_embeds=3), schedule("ddpm eps"), null_class=2)
    assert named.num_classes == 2
    assert_same_but_for_rounding(named(x, sigma), plain(x, sigma, torch.tensor([2, 2])))
    first = teacher_from(unet(num_class_embeds=3), schedule("edm euler"), null_class=0)
    assert first.num_classes == 3
    with pytest.raises(UserError, match="class 0 of this teacher means unconditional"):
        first(x, sigma, torch.tensor([0, 1]))
    with pytest.raises(UserError, match="null_class must be"):
        teacher_from(unet(num_class_embeds=3), schedule("ddpm eps"), null_class=3)
    assert_same_but_for_rounding(
        teacher_from(unet(), schedule("edm euler"))(x, sigma, None),
        teacher_from(unet(), schedule("edm euler"))(x, sigma),
    )


@torch.no_grad()
def test_the_autoencoder_scales_as_diffusers_does():
    codec = vae(scaling_factor=0.3, shift_factor=0.1)
    teacher = teacher_from(dit(num_embeds_ada_norm=2), schedule("ddpm eps"), vae=codec)
    decoder = decoder_of(Guided(teacher, 2.0))
    assert isinstance(decoder, Decoder)
    assert decoder.shape == (3, 16, 16)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    found = codec.encode(x).latent_dist
    z = decoder.encode(x)
    assert torch.allclose(z, (found.mean - 0.1) * 0.3, atol=1e-6)
    noise = torch.randn_like(z)
    assert torch.allclose(decoder.encode(x, noise), (found.mean + found.std * noise - 0.1) * 0.3, atol=1e-6)
    assert torch.allclose(decoder.decode(z), codec.decode(found.mean).sample, atol=1e-5)
    many = vae(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.0, 2.0, 4.0], scaling_factor=0.5)
    decoder = teacher_from(dit(num_embeds_ada_norm=2), schedule("ddpm eps"), vae=many).decoder
    mean = many.encode(x).latent_dist.mean
    shift, scale = (torch.tensor(v)[:, None, None] for v in ([1.0, 2, 3, 4], [1.0, 0.5, 0.25, 0.125]))
    assert torch.allclose(decoder.encode(x), (mean - shift) * scale, atol=1e-6)
    unit = VAEDecoder(codec, [1.0], [0.0], (8, 8), unit_pixels=True)
    assert torch.allclose(unit.encode(x), codec.encode((x + 1) / 2).latent_dist.mean, atol=1e-6)
    assert torch.allclose(unit.decode(z), 2 * codec.decode(z).sample - 1, atol=1e-5)


def test_the_autoencoder_is_no_part_of_a_student():
    teacher = teacher_from(dit(num_embeds_ada_norm=2), schedule("ddpm eps"), vae=vae())
    student = copy.deepcopy(teacher)
    assert student.decoder is teacher.decoder
    count = sum(p.numel() for p in teacher.net.parameters())
    assert sum(p.numel() for p in student.parameters()) == count
    z = torch.randn(1, 4, 8, 8, requires_grad=True)
    decode_samples(student, z).sum().backward()
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("make", ["unet", "dit"])
def test_features_and_training(make):
    model = unet() if make == "unet" else dit(in_channels=3, num_embeds_ada_norm=2)
    teacher = teacher_from(model, schedule("ddpm eps"))
    student = copy.deepcopy(teacher).requires_grad_(True)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 20.0])
    out, features = student(x, sigma, return_features=True)
    assert torch.equal(out, student(x, sigma))
    expected = [(2, 16, 4, 4)] if make == "unet" else [(2, 16, 4, 4)] * 2
    assert [tuple(f.shape) for f in features] == expected
    (out.square().mean() + features[0].square().mean()).backward()
    assert all(p.grad is not None for n, p in student.named_parameters() if "pos_embed" not in n)
    assert all(p.grad is None for p in teacher.parameters())
    torch.optim.SGD(student.parameters(), 0.1).step()
    assert not torch.equal(student(x, sigma), teacher(x, sigma))
    named = teacher_from(
        model, schedule("ddpm eps"), features=["conv_in"] if make == "unet" else ["pos_embed"]
    )
    assert len(named(x, sigma, return_features=True)[1]) == 1
    with pytest.raises(UserError, match="unknown module"):
        teacher_from(model, schedule("ddpm eps"), features=["midblock"])


@torch.no_grad()
def test_tokens_become_maps_the_right_way_round():
    model = dit(in_channels=3, num_embeds_ada_norm=2)
    teacher = teacher_from(model, schedule("ddpm eps"), features=["pos_embed"])
    x, sigma = torch.zeros(1, 3, 8, 8), torch.ones(1)
    base = teacher(x, sigma, return_features=True)[1][0]
    x[..., 0:2, 6:8] = 1.0  # the patch in row 0, column 3
    changed = (teacher(x, sigma, return_features=True)[1][0] - base).abs().sum(1)[0].nonzero()
    assert changed.tolist() == [[0, 3]]


def test_a_table_of_times_is_only_asked_for_its_rows():
    model = unet(time_embedding_type="learned", num_train_timesteps=1000)
    teacher = teacher_from(model, schedule("ddpm eps"))
    assert teacher.levels == "snap"
    assert check_teacher(teacher, tolerance=1e-4).relative < 1e-4
    between = teacher.path.rho(torch.tensor([500.4])).float()
    assert teacher(torch.randn(1, 3, 8, 8), between).isfinite().all()
