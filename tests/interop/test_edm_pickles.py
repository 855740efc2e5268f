"""What a network pickle may not do, and what is said of one that is damaged or of another kind."""

import io
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.interop.edm_checkpoint import read_edm
from distmatch.interop.edm_config import from_arguments
from distmatch.interop.inert_pickle import read_pickle
from tests.helpers import edm_pickles
from tests.helpers.edm_pickles import SMALL, teacher_and_pickle, write_pickle


class Runs:
    """Pickles to a call of ``function``."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, __import__, os.mkdir, torch.load])
def test_no_function_of_a_pickle_is_run(function, tmp_path):
    target = tmp_path / "trace"
    argument = {eval: f"open({str(target)!r}, 'w')", exec: f"open({str(target)!r}, 'w')"}.get(
        function, f"touch {target}" if function is os.system else str(target)
    )
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps({"ema": Runs(function, argument)}))
    with pytest.raises(UserError, match="not part of a network"):
        read_edm(path)
    assert not target.exists()


def test_source_text_and_inner_tensors_are_not_run_either(tmp_path):
    _, path = teacher_and_pickle(tmp_path, "edm")
    assert edm_pickles.SOURCE.encode() in path.read_bytes()
    read_edm(path)  # SOURCE would raise
    trace = tmp_path / "trace"
    inner = io.BytesIO()
    pickle.dump(0x1950A86A20F9469CFC6C, inner, protocol=2)
    pickle.dump(Runs(os.system, f"touch {trace}"), inner, protocol=2)
    outer = Runs(torch.storage._load_from_bytes, inner.getvalue())
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"ema": outer}))
    with pytest.raises(UserError, match="not part of a network"):
        read_edm(tmp_path / "bad.pkl")
    assert not trace.exists()


def test_a_pickle_cannot_change_what_later_pickles_meet(tmp_path):
    # BUILD on a looked-up function or class would set its attributes.
    for name in (
        "torch._utils\n_rebuild_tensor_v2",
        "torch.storage\n_load_from_bytes",
        "torch.nn.modules\nLinear",
    ):
        raw = b"c" + name.encode() + b"\n}U\x04evilK\x01sb."
        (tmp_path / "bad.pkl").write_bytes(raw)
        with pytest.raises(UserError, match="cannot be read"):
            read_pickle(tmp_path / "bad.pkl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_come_out_as_they_went_in(dtype, tmp_path):
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    views = OrderedDict(whole=whole, part=whole[1:3, ::2], turned=whole.T, none=whole[:0], one=whole[2, 3])
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(views))
    read = read_pickle(tmp_path / "t.pkl")
    for name, value in views.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], value)


def test_damage_and_wrong_files_are_refused(tmp_path):
    _, path = teacher_and_pickle(tmp_path, "edm")
    raw = path.read_bytes()
    cut = tmp_path / "cut.pkl"
    for end in (0, 100, len(raw) // 2, len(raw) - 1):
        cut.write_bytes(raw[:end])
        with pytest.raises(UserError, match=r"cut\.pkl"):
            read_edm(cut)
    cut.write_bytes(pickle.dumps({"G_ema": 1}))
    with pytest.raises(UserError, match="no EMA network"):
        read_edm(cut)
    with pytest.raises(UserError, match="cannot open"):
        read_edm(tmp_path / "missing.pkl")
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float32, _internal=True
    )
    outside = Runs(torch._utils._rebuild_tensor_v2, storage, 2, (3,), (1,), False, OrderedDict())
    cut.write_bytes(pickle.dumps(outside))
    with pytest.raises(UserError, match="outside of its storage"):
        read_pickle(cut)


def test_a_damaged_pickle_gives_a_message_and_nothing_else(tmp_path):
    """Random bytes are changed outside of the tensors' numbers: a message, or a teacher, never a crash."""
    _, path = teacher_and_pickle(tmp_path, "edm")
    raw = path.read_bytes()
    gen = np.random.default_rng(0)
    words = [raw.find(word) for word in (b"_init_kwargs", b"_modules", b"persistence", b"sigma_data", b"ema")]
    messages = 0
    for _ in range(60):
        bad = bytearray(raw)
        for at in gen.choice(words, 2) + gen.integers(-40, 200, 2):
            bad[min(max(0, at), len(bad) - 1)] = gen.integers(256)
        (tmp_path / "bad.pkl").write_bytes(bad)
        try:
            read_edm(tmp_path / "bad.pkl")
        except UserError:
            messages += 1
    assert messages > 20


def test_networks_that_are_not_read_say_so(tmp_path):
    teacher, _ = teacher_and_pickle(tmp_path, "adm")
    arguments = {**SMALL, "model_channels": 64, "model_type": "DhariwalUNet"}
    path = write_pickle(tmp_path / "x.pkl", teacher, "iDDPMPrecond", "DhariwalUNet", arguments)
    with pytest.raises(UserError, match="iDDPMPrecond"):
        read_edm(path)
    with pytest.raises(UserError, match="variant"):
        from_arguments("song", {**SMALL, "encoder_type": "skip"})
    with pytest.raises(UserError, match="unknown option"):
        from_arguments("song", {**SMALL, "color": 3})
    with pytest.raises(UserError, match="cannot be halved"):
        from_arguments("edm2", {**SMALL, "img_resolution": 9})
    wrong = write_pickle(
        tmp_path / "y.pkl", teacher, "EDMPrecond", "DhariwalUNet", {**arguments, "num_blocks": 2}
    )
    with pytest.raises(UserError, match="another architecture"):
        read_edm(wrong)
