"""The student of DPM-OT: a map takes noise to a stored latent of the teacher, where the last calls begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.files import load_into
from distmatch.diffusion.conditioning import ConditioningLike, labels_of
from distmatch.methods.start import Network
from distmatch.methods.student import Student
from distmatch.methods.transport.semi_discrete import BrenierMap


class TransportStudent(Student):
    """A student whose first input is a latent of the teacher at the first level, chosen by the noise.

    From there it draws from the posterior between its levels, so that one latent has many samples.

    Args:
        denoiser: The network of the last calls.
        levels: Their decreasing noise levels; the latents are at the first.
        transport: The map from noise to latents.
        info: What was distilled how; kept in the saved model's config.
    """

    from_noise = False

    def __init__(
        self,
        denoiser: Network,
        levels: tuple[float, ...],
        transport: BrenierMap,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(denoiser, levels, info, "posterior")
        self.transport = transport

    @classmethod
    def restored(
        cls,
        denoiser: Network,
        levels: tuple[float, ...],
        tensors: Mapping[str, Tensor],
        info: dict[str, Any] | None = None,
    ) -> TransportStudent:
        """The student of saved tensors.

        Raises:
            UserError: They are not those of a map.
        """
        if "targets" not in tensors:
            raise UserError("the tensors beside this model are no bank of latents", got=", ".join(tensors))
        transport = BrenierMap(tensors["targets"])
        load_into(transport, tensors, "the map beside this model")
        return cls(denoiser, levels, transport.requires_grad_(False), info)

    def tensors(self) -> dict[str, Tensor]:
        """The map: its latents, heights, and where it is smoothed."""
        return self.transport.state_dict()

    @property
    def draws(self) -> int:
        """One for the map, one for each call after the first, and one for the mixtures of latents."""
        return self.nfe + 1

    def begin(self, noise: list[Tensor], conditioning: ConditioningLike) -> Tensor:
        """The latents of the first noise, at the first level; the last noise is for mixtures.

        Raises:
            UserError: A conditional student is asked for samples of no class.
        """
        labels = labels_of(conditioning)
        if self.num_classes and (labels is None or bool((labels < 0).any())):
            raise UserError(
                "this student has stored latents of each class and none without a class",
                got="label -1, or no labels",
                expected=f"labels from 0 to {self.num_classes - 1}",
            )
        classes = labels if self.num_classes else None
        latents: Tensor = self.transport(noise[0], classes, self.levels[0], noise[-1])
        return latents
