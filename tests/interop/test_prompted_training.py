"""Distillation on prompts, and on images with captions: what is encoded when, and what reaches a step."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.data.images import read_image
from distmatch.diffusion.conditioning import null_conditioning
from distmatch.interop.encodings import encoded
from distmatch.interop.pipelines.text_parts import text_modules
from distmatch.training import prompt_batches
from distmatch.training.options import DistillOptions
from distmatch.training.pipeline_options import EncodingOptions, PipelineOptions
from distmatch.training.prepare import prepare_distillation
from tests.helpers.command import command, contents, done
from tests.helpers.pipelines import save
from tests.helpers.prompted import PROMPTS, SHORT, SIZE, prompted


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return prompted(tmp_path_factory.mktemp("prompted"))


@pytest.fixture(scope="module")
def teacher(place):
    return dm.load_teacher(place / "stable-diffusion-3", height=16, width=16, max_sequence_length=12)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def asked(monkeypatch):
    """How many prompts and images are encoded to the cache."""
    counts = {"prompts": 0, "images": 0}

    def counted(folder, fingerprint, keys, compute, *, what, **more):
        def noted(rows):
            counts[what] += len(rows)
            return compute(rows)

        return encoded(folder, fingerprint, keys, noted, what=what, **more)

    monkeypatch.setattr(prompt_batches, "encoded", counted)
    return counts


def options(place, method="sid", batch=2, **changes):
    base = DistillOptions.of(method, "laptop", **changes)
    return replace(base, run=replace(base.run, steps=10, batch=batch, seed=0))


@pytest.mark.slow
def test_prompts_alone_from_the_command_line(place, tmp_path, cache):
    line = f"distill --teacher {place}/stable-diffusion-3 {SIZE} --prompts {place}/prompts.txt {SHORT}"
    more = "--prompt-dropout 0.3"
    told = done(f"{line} {more} --out {tmp_path}/whole --json").json()
    assert told["steps"] == 10
    text = (tmp_path / "whole" / "config.toml").read_text()
    for words in ('prompts = "', "size = [16]", "max_tokens = 12", "prompt_dropout = 0.3"):
        assert words in text
    student = dm.Student.from_pretrained(tmp_path / "whole")  # finds its base at its size
    assert student.denoiser.prompt_encoder.encode(["a cat"]).batch_size == 1
    assert student.info["prompts"]["number"] == 4
    # In two parts, the second from the cache: the same weights.
    done(f"{line} {more} --out {tmp_path}/parts --steps 5")
    before = contents(cache)
    done(f"distill --resume --out {tmp_path}/parts --steps 10")
    assert contents(cache) == before
    parts, whole = (tmp_path / run / "model" / "adapter_model.safetensors" for run in ("parts", "whole"))
    assert parts.read_bytes() == whole.read_bytes()
    changed = command(f"distill --resume --out {tmp_path}/parts --steps 12 --prompt-dropout 0.5")
    assert changed.code == 2
    assert "prompt-dropout" in changed.err


@pytest.mark.parametrize("encode", ["cache", "live"])
def test_prompts_that_are_cut_off_are_counted_in_the_log_of_the_run(encode, place, tmp_path, cache):
    (tmp_path / "long.txt").write_text("a red cat in the house and so on " * 20 + "\na dog\n")
    line = f"distill --teacher {place}/stable-diffusion-3 {SIZE} --prompts {tmp_path}/long.txt {SHORT}"
    found = done(f"{line} --encode {encode} --out {tmp_path}/run")
    events = [json.loads(text) for text in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    raised = [event["message"] for event in events if event["event"] == "warning"]
    cut = [message for message in raised if "12 tokens of tokenizer_3" in message]
    assert len(cut) == 1
    assert cut[0].startswith("1 of 2 prompts is ")
    assert cut[0] in found.err
    assert "tracing how it calls its network" in found.err


@pytest.mark.slow
def test_dmd_makes_its_pairs_under_the_prompts_and_again_on_resuming(place, teacher, tmp_path):
    line = f"distill --teacher {place}/stable-diffusion-3 {SIZE} --prompts {place}/prompts.txt --batch 2"
    more = "--method dmd --pair-steps 2 --guidance 2 --lr 1e-3"
    found = done(f"{line} {more} --pairs 1000000 --dry-run --steps 6 --json").json()
    assert found["pair_calls"] == 1_000_000 * 3 * 2
    # Two pairs take a millisecond at least, and the others as long.
    assert found["estimated_seconds"] > found["seconds_once"] > 500
    assert "(--pairs" not in str(found["warnings"])
    done(f"{line} {more} --pairs 6 --out {tmp_path}/whole --steps 6")
    done(f"{line} {more} --pairs 6 --out {tmp_path}/parts --steps 3")
    done(f"distill --resume --out {tmp_path}/parts --steps 6")
    parts, whole = (load_file(tmp_path / run / "model/model.safetensors") for run in ("parts", "whole"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    common = {"method": "dmd", "batch": 2, "pairs": 4, "pair_steps": 2, "steps": 4, "quiet": True}
    for train in ("full", "lora"):
        student = dm.distill(teacher, prompts=PROMPTS, train=train, **common)
        told = teacher.pipeline.encode(PROMPTS)
        assert bool(student.sample(4, conditioning=told, decode=False).isfinite().all())


@pytest.mark.slow
def test_the_cache_and_live_encoding_train_the_same_student(teacher, asked):
    common = {"method": "sid", "steps": 10, "batch": 2, "train": "lora", "lora_rank": 2, "quiet": True}
    once = dm.distill(teacher, prompts=PROMPTS, **common)
    assert asked == {"prompts": 4, "images": 0}
    assert not text_modules(teacher.pipeline.tracer.pipeline)
    live = dm.distill(teacher, prompts=PROMPTS, encode="live", **common)
    assert asked["prompts"] == 4
    assert text_modules(teacher.pipeline.tracer.pipeline)  # loaded again
    again = dm.distill(teacher, prompts=PROMPTS, **common)
    assert asked["prompts"] == 4
    told = teacher.pipeline.encode(PROMPTS[:2])
    x = [student.sample(2, conditioning=told, decode=False) for student in (once, live, again)]
    assert torch.equal(x[0], x[2])
    assert (x[0] - x[1]).abs().max() < 1e-3 * x[0].abs().max()  # rounding of encodings, through 10 steps


def test_rows_of_a_batch_are_encoded_prompts_or_the_null_prompt(teacher, place):
    told = teacher.pipeline.encode(PROMPTS)
    null = null_conditioning(teacher, 1)
    share, n = 0.3, 64
    encoding = EncodingOptions(prompt_dropout=share)
    job = prepare_distillation(
        options(place, batch=n, prompts=str(place / "prompts.txt"), encoding=encoding), teacher
    )
    plain = prepare_distillation(options(place, batch=n, prompts=str(place / "prompts.txt")), teacher)
    masks = []
    for step in range(4):
        batch, whole = job.batches(step), plain.batches(step)
        for field in told:
            same = [(whole.conditioning[field][:, None] - told[field][None]).abs().flatten(2).amax(2) < 1e-5]
            assert bool(same[0].any(1).all())
        kept = (batch.conditioning["pooled_projections"] == whole.conditioning["pooled_projections"]).all(1)
        for field in told:
            row = batch.conditioning[field]
            assert torch.equal(row[kept], whole.conditioning[field][kept])
            assert torch.equal(row[~kept], null[field].expand(n, *row.shape[1:])[~kept])
        masks.append(~kept)
        again = job.batches(step)
        assert all(torch.equal(again.conditioning[field], batch.conditioning[field]) for field in told)
    assert not torch.equal(masks[0], masks[1])
    dropped = int(torch.cat(masks).sum())
    assert abs(dropped - share * 4 * n) < 4 * (4 * n * share * (1 - share)) ** 0.5  # 4 standard deviations


def test_prompts_that_are_cut_off_are_counted_each_time(teacher, place, asked):
    texts = [*PROMPTS, "a small red cat runs under the large blue tree in the green house by the river"]
    for count in (5, 5):
        job = prepare_distillation(options(place), teacher, texts=texts)
        limits = " and the ".join(f"12 tokens of tokenizer{part}" for part in ("", "_2", "_3"))
        said = f"1 of 5 prompts is longer than the {limits}, and is truncated there"
        assert sum(message.startswith(said) for message in job.warnings) == 1
        assert asked["prompts"] == count


def test_images_with_captions_are_encoded_once(place, asked):
    """Each image is beside its own caption, cropped to the size of the teacher."""
    teacher = dm.load_teacher(place / "stable-diffusion-3", height=16, width=16, max_sequence_length=12)
    chosen = options(place, "dmd2", batch=4, prompts=str(place / "images"))
    job = prepare_distillation(chosen, teacher)
    assert asked == {"prompts": 4, "images": 4}
    batch = job.batches(0)
    told = teacher.pipeline.encode(PROMPTS)
    pooled = told["pooled_projections"]
    order = (batch.conditioning["pooled_projections"][:, None] - pooled[None]).abs().sum(2).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    images = [torch.from_numpy(read_image(place / "images" / f"{i}.png", (16, 16)).copy()) for i in order]
    x = torch.stack(images).float() / 127.5 - 1
    mean, spread = teacher.decoder.encode(x), 0.0
    tail = teacher.pipeline.tail
    with torch.no_grad():
        spread = tail.vae.encode(x).latent_dist.std / tail.scale.reshape(tail.latent)
    noise = (batch.x - mean) / spread  # a draw from the encoder's Gaussian
    assert noise.abs().max() < 6
    assert (noise[0] - noise[1]).abs().max() > 1  # each has its own
    assert abs(noise.std().item() - 1) < 4 * (2 * noise.numel()) ** -0.5
    assert torch.equal(prepare_distillation(chosen, teacher).batches(0).x, batch.x)
    assert asked == {"prompts": 4, "images": 4}
    student = dm.distill(teacher, prompts=place / "images", method="dmd2", steps=10, batch=2, quiet=True)
    assert student.export(torch.zeros(1, 3, 16, 16)).dtype == np.uint8
    # --data with the same folder
    same = prepare_distillation(options(place, "dmd2", batch=4, data=str(place / "images")), teacher)
    assert torch.equal(same.batches(0).x, batch.x)


@pytest.mark.slow
def test_an_image_replaced_under_its_caption_is_noticed_on_resume(place, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    line = f"distill --teacher {place}/stable-diffusion-3 {SIZE} --prompts {tmp_path}/images --method dmd2"
    done(f"{line} --batch 2 --steps 5 --out {tmp_path}/run")
    again = f"distill --resume --out {tmp_path}/run --steps 7"
    ahead = json.loads(done(f"{again} --dry-run --json").out)
    assert ahead["continues_from"] == 5
    assert ahead["estimated_seconds"] == pytest.approx(
        ahead["seconds_once"] + 2 * ahead["seconds_per_step"], abs=0.06
    )
    shutil.copy(place / "images" / "3.png", tmp_path / "images" / "0.png")
    for more in ("", " --dry-run"):
        answer = command(again + more)
        assert answer.code == 2
        assert "keeps its data" in answer.err
    shutil.copy(place / "images" / "0.png", tmp_path / "images" / "0.png")
    done(f"distill --resume --out {tmp_path}/run --steps 6")


@pytest.mark.parametrize("method", ["consistency", "rcm", "disback", "f-distill"])
def test_methods_that_read_images_take_them_with_captions(place, teacher, method):
    common = {"method": method, "steps": 30, "batch": 2, "num_steps": 2, "train": "lora", "lora_rank": 2}
    with pytest.raises(UserError, match=rf"{method} needs real images, and these are prompts alone"):
        dm.distill(teacher, prompts=PROMPTS, quiet=True, **common)
    student = dm.distill(teacher, prompts=place / "images", quiet=True, **common)
    told = teacher.pipeline.encode(PROMPTS)
    assert student.sample(4, conditioning=told).shape == (4, 3, 16, 16)


def test_arrays_with_a_caption_for_each(place, teacher, asked):
    raw = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    raw[0, 0, 0, :2] = torch.tensor([0, 255])
    data = dm.data.from_arrays(raw.numpy().transpose(0, 2, 3, 1), None, name="array")
    job = prepare_distillation(options(place, "dmd2", batch=4), teacher, data, texts=PROMPTS)
    assert asked == {"prompts": 4, "images": 4}
    assert job.batches(0).x.shape == (4, 4, 8, 8)
    latents = dm.Dataset(torch.randn(4, 4, 8, 8), None, (), "z", dm.data.Scaling.for_images(-1, 1, "latents"))
    job = prepare_distillation(options(place, "dmd2", batch=4), teacher, latents, texts=PROMPTS)
    assert asked["images"] == 4
    with pytest.raises(UserError, match=r"one prompt for each sample.*3 prompts.*4 samples"):
        prepare_distillation(options(place, "dmd2", batch=4), teacher, data, texts=PROMPTS[:3])


def test_encodings_of_another_pipeline_are_not_used(place, tmp_path, asked):
    other = save("stable-diffusion-3", tmp_path, seed=1)
    common = {"height": 16, "width": 16, "max_sequence_length": 12}
    for folder, count in ((place / "stable-diffusion-3", 4), (other, 8), (other, 8)):
        teacher = dm.load_teacher(folder, **common)
        told = teacher.pipeline.encode(PROMPTS)
        batch = prepare_distillation(options(place), teacher, texts=PROMPTS).batches(0)
        for field, rows in told.items():
            gaps = (batch.conditioning[field][:, None] - rows[None]).abs().flatten(2).amax(2)
            assert gaps.amin(1).max() < 1e-5
        assert asked["prompts"] == count


def test_pipelines_that_pad_to_the_longest(place, tmp_path):
    save("z-image", tmp_path)
    sizes = PipelineOptions(size=(16,), max_tokens=32)
    texts = ["a cat", "a small red cat runs in a house"]
    with pytest.raises(UserError, match="--tokens 128, or --encode live"):
        prepare_distillation(options(place, teacher=str(tmp_path / "z-image"), pipeline=sizes), texts=texts)
    fixed = replace(sizes, tokens=40)
    job = prepare_distillation(options(place, teacher=str(tmp_path / "z-image"), pipeline=fixed), texts=texts)
    assert {len(rows) for rows in job.batches(0).conditioning.values()} == {2}


def test_the_pipeline_may_be_gone_when_all_is_encoded(tmp_path):
    folder = save("stable-diffusion-3", tmp_path)
    teacher = dm.load_teacher(folder, height=16, width=16, max_sequence_length=12)
    batch = prepare_distillation(options(tmp_path), teacher, texts=PROMPTS).batches(0)
    shutil.rmtree(folder)
    assert teacher.decoder.decode(batch.x).shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="freed"):
        teacher.pipeline.encode(["a dog"])
