"""A text encoder of transformers as the prompt encoder of a model that is trained here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError, cause
from distmatch.diffusion.conditioning import Conditioning
from distmatch.interop.optional import OptionalPackage
from distmatch.nets.text import HIDDEN, MASK

_TRANSFORMERS = OptionalPackage("transformers", "text encoders need", "diffusers")
_AT_A_TIME = 256  # prompts


class TextEncoder:
    """Prompts as the hidden states of a frozen encoder, in half precision, and which of them are text.

    Tokenizer and network are loaded with the first prompt, on the CPU. Nothing is downloaded, no pickle is
    opened, and no code in the folder is run.

    Args:
        folder: With ``config.json``, weights in safetensors, and a tokenizer.
        length: Tokens to which prompts are padded.
        known: The fingerprint that the encoder must have; '' accepts any.

    Raises:
        UserError: The folder has no such encoder.
    """

    def __init__(self, folder: str | os.PathLike[str], length: int, known: str = "") -> None:
        self.folder, self.length, self._known = Path(folder).absolute(), length, known
        self._loaded: tuple[Any, torch.nn.Module] | None = None
        self._fingerprint = known

    @classmethod
    def of(cls, folder: str | os.PathLike[str], captions: Iterable[str]) -> TextEncoder:
        """The encoder in a folder, as long as the longest caption.

        Raises:
            UserError: The folder has no encoder, or the caption is longer than the encoder can read.
        """
        encoder = cls(folder, 1)
        tokenizer, network = encoder._parts()
        lengths = {caption: len(tokenizer(caption)["input_ids"]) for caption in set(captions)}
        longest = max(lengths, key=lambda caption: lengths[caption])
        positions = getattr(network.config, "max_position_embeddings", None) or tokenizer.model_max_length
        most = min(positions, tokenizer.model_max_length)
        if lengths[longest] > most:
            raise UserError(
                f"{sum(n > most for n in lengths.values())} captions are longer than {folder} can read",
                got=f"{lengths[longest]} tokens: {longest[:80]!r}",
                expected=f"at most {most}",
                fix="shorten the captions, or choose another encoder",
            )
        encoder.length = lengths[longest]
        return encoder

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextEncoder:
        """The encoder that :meth:`to_dict` described; its folder is read when it is needed."""
        return cls(values["folder"], values["length"], values["fingerprint"])

    def to_dict(self) -> dict[str, Any]:
        """Its JSON form: where it is, and what it must be."""
        return {"folder": str(self.folder), "length": self.length, "fingerprint": self.fingerprint}

    def __deepcopy__(self, memo: dict[int, Any]) -> TextEncoder:
        return self  # frozen; copies of a denoiser share it

    @property
    def size(self) -> int:
        """Size of a hidden state."""
        config: Any = self._parts()[1].config
        return int(config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """A sha256 (hex) of the files of the encoder."""
        if not self._fingerprint:
            self._fingerprint = _fingerprint(self.folder)
        return self._fingerprint

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The fields ``hidden_states``, float16 (B, length, size), and ``mask``, int64 (B, length).

        Raises:
            UserError: A prompt has more tokens than ``length``, or the encoder cannot be loaded.
        """
        tokenizer, network = self._parts()
        unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        hidden, mask = [], []
        for start in range(0, len(unique), _AT_A_TIME):
            texts = list(unique)[start : start + _AT_A_TIME]
            given = tokenizer(texts, padding="max_length", max_length=self.length, return_tensors="pt")
            ids, there = given["input_ids"], given["attention_mask"]
            if ids.shape[1] > self.length:
                longest = max(texts, key=lambda text: len(tokenizer(text)["input_ids"]))
                raise UserError(
                    "this prompt is longer than the captions that the model was trained on",
                    got=f"{ids.shape[1]} tokens: {longest!r}",
                    expected=f"at most {self.length}",
                )
            states: Tensor = network(input_ids=ids, attention_mask=there).last_hidden_state
            hidden.append(states * there[..., None])
            mask.append(there)
        rows = torch.tensor([unique[prompt] for prompt in prompts])
        states = torch.cat(hidden).half()
        if not states.isfinite().all():
            raise UserError(f"the hidden states of {self.folder} do not fit in half precision")
        return Conditioning({HIDDEN: states[rows], MASK: torch.cat(mask)[rows]})

    def _parts(self) -> tuple[Any, torch.nn.Module]:
        """Tokenizer and network."""
        if self._loaded is None:
            _check(self.folder)
            if self._known and _fingerprint(self.folder) != self._known:
                raise UserError(
                    f"{self.folder} is another text encoder than the one that the model was trained with",
                    fix="put the original files back",
                )
            self._loaded = _loaded(self.folder)
        return self._loaded


def _check(folder: Path) -> None:
    """Refuses a folder without config and safetensors, or with code."""
    expected = "a folder with config.json, model.safetensors and a tokenizer, as transformers saves them"
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder with a text encoder", expected=expected, fix="check the path")
    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        found = ", ".join(sorted(names)[:8]) or "an empty folder"
        raise UserError(f"{folder} contains no text encoder that is read", got=found, expected=expected)


def _fingerprint(folder: Path) -> str:
    _check(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".safetensors"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _loaded(folder: Path) -> tuple[Any, torch.nn.Module]:
    transformers = _TRANSFORMERS.load()
    here = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **here)
            network = transformers.AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, **here
            )
    except MemoryError:
        raise
    except Exception as error:  # files that may hold anything
        raise UserError(f"transformers cannot load {folder}", got=cause(error)) from error
    if getattr(network.config, "is_encoder_decoder", False):
        network = network.get_encoder()
    network = getattr(network, "text_model", network)  # of a pair of encoders, for images and texts
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, network.eval().requires_grad_(False)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    log = transformers.utils.logging
    shown, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if shown:
            log.enable_progress_bar()
