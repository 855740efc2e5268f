"""The data and prompts of a distillation: what the options name, and whether teacher and method take it."""

from __future__ import annotations

from collections.abc import Sequence

from distmatch.base.errors import UserError
from distmatch.data import Dataset, load_data
from distmatch.data.columns import columns_of
from distmatch.data.prompts import prompts_path
from distmatch.diffusion.conditioning import spec_of
from distmatch.diffusion.denoiser import Denoiser
from distmatch.interop import decoder_of
from distmatch.methods.construct import refuse_conditions
from distmatch.methods.matching.pairs import require_one_step
from distmatch.methods.matching.settings import DMDSettings
from distmatch.methods.method import Method
from distmatch.methods.settings import AdversarialSettings
from distmatch.training.distill_data import check_fit
from distmatch.training.known_data import known_data, seen_by, with_encodings
from distmatch.training.latent_data import check_encodable
from distmatch.training.options import DistillOptions
from distmatch.training.prompted import Prompts, given_prompts, is_captioned, prompts_alone


def given_data(
    options: DistillOptions,
    teacher: Denoiser,
    method: Method,
    spec: str,
    *,
    needs_data: bool,
    data: Dataset | None = None,
    texts: Sequence[str] | None = None,
    conditioned: bool = False,
) -> tuple[Dataset | None, Prompts | None]:
    """Data as the teacher numbers their classes, and prompts. Nothing is encoded by a pipeline.

    Args:
        options: The options.
        teacher: The teacher, which may be on the meta device.
        method: The method.
        spec: The data that options or teacher name; '' for none.
        needs_data: Whether the method compares with real samples, with its settings.
        data: Samples, if they are known already.
        texts: Prompts in place of those that the options name.
        conditioned: Whether a conditioning takes the place of prompts.

    Raises:
        UserError: They are missing, or do not go together.
    """
    if data is None and spec and not is_captioned(spec, teacher):
        columns = columns_of(known_data(teacher))
        data = load_data(spec, labels=bool(spec_of(teacher)), columns=columns)
    prompts = None
    if not conditioned:
        prompts = given_prompts(options, teacher, data, texts, needs_data=needs_data)
    if data is None and prompts is None and needs_data:
        raise _without_data(method)
    if data is not None:
        data = with_encodings(data, teacher) if prompts is None else data
        # What does not fit is refused before anything is encoded: first the shape, which says the most.
        check_encodable(data, teacher)
        if decoder_of(teacher) is None:
            check_fit(teacher, data, prompts=prompts is not None)
        data = seen_by(data, known_data(teacher), teacher.num_classes, "the teacher")
    return data, prompts


def check_pipeline_method(options: DistillOptions, method: Method) -> None:
    """Refuses what a method cannot do with any pipeline that takes prompts, before one is loaded.

    Raises:
        UserError: The method takes class labels alone or jumps, or makes pairs for several steps.
    """
    own = options.settings
    refuse_conditions(method, own, external=True, got="a pipeline with prompts")
    if isinstance(own, DMDSettings):
        require_one_step(len(own.student_times) or own.num_steps, method.name)


def check_pipeline_data(options: DistillOptions, method: Method, divergence: str) -> None:
    """Refuses a method that is certain to need real images where none are named, before a pipeline is loaded.

    Args:
        options: The options.
        method: Their method.
        divergence: Its name.

    Raises:
        UserError: It is.
    """
    own = options.settings
    weighted = method.divergences == "any" and divergence != "reverse_kl"
    compares = weighted or not isinstance(own, AdversarialSettings) or own.gan_weight > 0
    if method.data == "no" or not compares or options.data:
        return
    if not options.prompts:
        raise _without_data(method)
    if not prompts_path(options.prompts)[0].is_dir():
        raise prompts_alone(method.name, f"--prompts {options.prompts}")


def _without_data(method: Method) -> UserError:
    return UserError(
        f"{method.name} needs real data{_for_what(method)}",
        got="a teacher that does not say what it was trained on, and no --data",
        fix="pass --data, or use --method diff-instruct, which needs none",
    )


def _for_what(method: Method) -> str:
    return ", for the density ratio or the adversarial term" if method.family == "matching" else ""
