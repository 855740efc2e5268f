"""Faults of one of several processes: the others end with one message, and the run continues."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alone import STEPS, TRAIN, Case, Outcome, Place
from disks import damage_file
from launches import Fault, Launch, begun, distance, fresh, result_of

from distmatch.training.checkpoint import list_checkpoints

TIMEOUT = 15.0
"""Seconds after which processes give a silent one up, here."""
SLACK = 15.0
"""Seconds that they have to end, besides."""
EQUAL = 1e-5


def _continued(place: Place, line: Sequence[str], out: Path, size: int) -> str:
    """Continues a run in several processes; why it is lost."""
    given = [line[0], "--resume"] if begun(out) else list(line)
    launch = Launch([*given, "--out", str(out)], place.folder, [()] * size, timeout=60)
    codes = launch.wait()
    launch.end()
    if codes != [0] * size:
        return f"continuing ended with {codes}: {launch.messages()}"
    apart = distance(out, _undisturbed(place, line))
    return "" if apart <= EQUAL else f"the result differs by {apart:.1e}"


def _undisturbed(place: Place, line: Sequence[str]) -> Path:
    """The run folder of one process without a fault."""
    out = place.folder / f"alone-{line[0]}"
    if not out.exists():
        place.whole([word for word in line if word not in ("--parallel", "fsdp2")], out)
        result_of(out)
    return out


def disturbed(
    place: Place,
    kind: str,
    what: str,
    line: Sequence[str],
    faults: Sequence[Fault],
    *,
    hit: Sequence[int] = (),
    codes: Sequence[int] = (1,),
    address: str = "127.0.0.1",
    act: Callable[[Launch], None] = lambda launch: None,
    then: Callable[[], None] = lambda: None,
    messages: int = 1,
) -> Outcome:
    """A run in several processes, with a fault, and what came of it.

    Args:
        place: The folder.
        kind: The kind of fault.
        what: This one.
        line: The command line without ``--out``.
        faults: See :mod:`injected`, for each process.
        hit: The processes that die or hang; the others have to end by themselves.
        codes: The exit codes that are right for the others.
        address: Where rank 0 listens.
        act: Does something while the run goes on.
        then: Does something after the processes ended.
        messages: How many there may be: one for each part of the network.
    """
    out = fresh(place.folder / "disturbed")
    launch = Launch([*line, "--out", str(out)], place.folder, faults, timeout=TIMEOUT, address=address)
    act(launch)
    others = [rank for rank in range(len(faults)) if rank not in hit]
    launch.wait(120, others[:1])
    began = time.monotonic()
    launch.wait(TIMEOUT + SLACK, others)
    took = time.monotonic() - began
    found = [launch.processes[rank].exitcode for rank in others]
    launch.end()
    then()
    said = launch.messages()
    lost = _continued(place, line, out, len(faults))
    if any(code not in codes for code in found):
        lost = lost or f"exit codes {found}"
    if not 1 <= len(said) <= messages or any(
        "Traceback" in text or "internal error" in text for text in said
    ):
        lost = lost or f"not one message: {said}"
    text = said[0].replace(str(place.folder), "...") if said else "none"
    return Outcome(kind, what, text, lost, took)


def lines(place: Place) -> dict[str, list[str]]:
    """The command lines by name."""
    return {"train": TRAIN, "distill": place.distill, "train, fsdp2": [*TRAIN, "--parallel", "fsdp2"]}


def died(place: Place, scale: float) -> Iterator[Case]:
    """A process is killed or stopped at a step; the others end within the timeout."""
    for kind, number, count in (("rank dies", signal.SIGKILL, 4), ("rank hangs", signal.SIGSTOP, 2)):
        for name, line in lines(place).items():
            for i in range(max(1, round(count * scale))):
                size = 4 if i % 4 == 3 else 2
                rank, n = place.moments.randrange(size), place.moments.randrange(STEPS)
                faults: list[Fault] = [()] * size
                faults[rank] = ("signal_at_step", n, number)
                what = f"{name}, process {rank} of {size}, step {n}"
                yield lambda kind=kind, what=what, line=line, faults=faults, rank=rank: disturbed(
                    place, kind, what, line, faults, hit=[rank]
                )


def failed(place: Place, scale: float) -> Iterator[Case]:
    """One process alone has no memory, or a full disk, or gets SIGTERM."""
    for name, line in lines(place).items():
        for i in range(max(1, round(2 * scale))):
            rank, n = i % 2, place.moments.randrange(STEPS)
            for kind, fault, codes in (
                ("out of memory in one of two", ("no_memory_at_step", n), (1, 2)),
                ("SIGTERM to one of two", ("signal_at_step", n, signal.SIGTERM), (143,)),
            ):
                faults: list[Fault] = [(), ()]
                faults[rank] = fault
                what = f"{name}, process {rank}, step {n}"
                # Without torchrun's agent the first process takes the place where they agree along with it.
                most = 2 if "fsdp2" in name and rank == 0 else 1
                yield (
                    lambda kind=kind, what=what, line=line, faults=faults, codes=codes, most=most: disturbed(
                        place, kind, what, line, faults, codes=codes, messages=most
                    )
                )


def damaged_shards(place: Place, scale: float) -> Iterator[Case]:
    """A share of the newest checkpoint is damaged."""

    def case(damage: str, where: float) -> Outcome:
        line, out = lines(place)["train, fsdp2"], fresh(place.folder / "disturbed")
        faults: list[Fault] = [(), ("signal_at_step", 11, signal.SIGKILL)]
        launch = Launch([*line, "--out", str(out)], place.folder, faults, timeout=TIMEOUT)
        launch.wait(60)
        launch.end()
        newest = list(list_checkpoints(out / "checkpoints").values())[-1]
        damage_file(sorted((newest / "shards").glob("*.safetensors"))[-1], damage, where)
        return Outcome("damaged shares", damage, "none", _continued(place, line, out, 2))

    for damage in ("cut", "emptied", "removed", "flipped")[: max(1, round(4 * scale))]:
        where = place.moments.random()
        yield lambda damage=damage, where=where: case(damage, where)


def absent(place: Place, scale: float) -> Iterator[Case]:
    """Fewer processes start than the launch has."""

    def case(size: int, world: int) -> Outcome:
        out = fresh(place.folder / "disturbed")
        line = [*TRAIN, "--out", str(out)]
        launch = Launch(line, place.folder, [()] * size, timeout=3, world=world)
        codes = launch.wait(60)
        launch.end()
        said = launch.messages()
        lost = "" if codes == [2] * size and len(said) == 1 else f"exit codes {codes}, messages {said}"
        if out.exists():
            lost = lost or "a folder was made"
        lost = lost or _continued(place, TRAIN, out, 2)
        return Outcome("processes absent", f"{size} of {world}", said[0] if said else "none", lost)

    for size, world in ((1, 2), (2, 3), (3, 4))[: max(1, round(3 * scale))]:
        yield lambda size=size, world=world: case(size, world)


def parted(place: Place, scale: float) -> Iterator[Case]:
    """The network between two namespaces is cut, for good or for a while, during a run."""
    with namespaces() as names:
        for i in range(max(1, round(6 * scale))):
            if names is None:
                yield lambda: Outcome("network partition", "skipped: namespaces need root", "", "")
                continue
            name, line = list(lines(place).items())[i % 3]
            seconds = place.moments.uniform(0, 1)

            def cut(launch: Launch, seconds: float = seconds) -> None:
                until = time.monotonic() + 60
                log = place.folder / "disturbed" / "log.jsonl"
                while not log.exists() and time.monotonic() < until:
                    time.sleep(0.01)
                time.sleep(seconds)
                _link(names[0], "down")

            def mend() -> None:
                _link(names[0], "up")

            faults: list[Fault] = [("networked", one, "dm0", 0.3) for one in names]
            yield lambda name=name, line=line, seconds=seconds, faults=faults, cut=cut, mend=mend: disturbed(
                place, "network partition", f"{name}, {seconds:.1f} s after its start", line, faults,
                address="10.213.77.1", act=cut, then=mend, messages=2,
            )  # fmt: skip


def _link(name: str, state: str) -> None:
    subprocess.run(["ip", "-n", name, "link", "set", "dm0", state], check=True)


@contextmanager
def namespaces() -> Iterator[list[str] | None]:
    """Two network namespaces that reach each other; None where they cannot be made."""
    names = ["distmatch-faults-0", "distmatch-faults-1"]
    commands = [["netns", "add", name] for name in names]
    ends = ["dm0", "netns", names[0], "type", "veth", "peer", "name", "dm0", "netns", names[1]]
    commands += [["link", "add", *ends]]
    for i, name in enumerate(names):
        commands += [["-n", name, "addr", "add", f"10.213.77.{i + 1}/24", "dev", "dm0"]]
        commands += [["-n", name, "link", "set", device, "up"] for device in ("dm0", "lo")]
    try:
        good = all(
            subprocess.run(["ip", *command], capture_output=True).returncode == 0 for command in commands
        )
        yield names if good else None
    except FileNotFoundError:  # no ip
        yield None
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


KINDS = (died, failed, damaged_shards, absent, parted)
