"""Pack what travels to a bare machine and back, in parts: `python -m experiments.accelerator.parcels`.

CIFAR-10 travels there, records and trained networks travel home. docs/guides/accelerator.md tells how.
"""

import contextlib
import dataclasses
import gzip
import inspect
import io
import math
import os
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from experiments.accelerator import networks, plan
from experiments.accelerator.lossless import compressed, expanded
from experiments.accelerator.packing import manifest_of, pack, read_manifest, unpack
from experiments.configs.study import preset
from experiments.data.cifar import CIFAR10_SHA256, NPZ_NAME, load_cifar10
from experiments.data.store import NAMES, CorruptData, cache_dir, cached, read_npz
from experiments.paper.collect import KEYS, replace, united
from experiments.paper.rows import METRICS, NETWORK, TRAINED, folder_name, folder_of, home_of, key_of
from qt_jax import records
from qt_jax.command_line import exit_status, read_flags, statuses, text_console
from qt_jax.errors import InvalidInput
from qt_jax.files import write_whole

DATA, RESULTS = "cifar10", "results"
"""Names of the two parcels."""

SENT = "sent.txt"
"""File in the folder of a preset: the networks that were packed for the way home, one path a line."""

RECORDS = (".jsonl", ".log")
"""Suffixes of records, curves and logs."""

MOST_DATA, MOST_FILES = 55, 8
"""Megabytes of a part of the data at most, and files that come home at a time at most."""

BESIDE = 32_768
"""Bytes of an archive beside the content of its last file, at most: header, padding, the end."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Pack CIFAR-10 without loss for a machine that has no network, in parts that travel one by one.

    Example:
        python -m experiments.accelerator.parcels data --out parcels
    """

    out: Path
    """Folder of the parts and their manifest."""
    megabytes: float = 40.0
    """Size of a part at most, in millions of bytes; 55 at most."""

    def __post_init__(self):
        if not 0 < self.megabytes <= MOST_DATA:
            raise InvalidInput(f"--megabytes must be above 0 and at most {MOST_DATA}, got {self.megabytes:g}")


@dataclasses.dataclass(frozen=True)
class Join:
    """Join the parts of CIFAR-10 in the data cache, $QT_JAX_DATA. No network is needed.

    Example:
        python -m experiments.accelerator.parcels join parcels
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the parts and their manifest."""


@dataclasses.dataclass(frozen=True)
class Send:
    """Pack all records and curves, and as many networks as fit, in the order of their worth.

    The same command packs the next networks into another folder. runs/paper-PRESET/sent.txt lists those that
    were packed; take lines out of it to pack them once more.

    Example:
        python -m experiments.accelerator.parcels send --runs runs --out parcels
    """

    out: Path
    """Folder that gets the parcel. It must not hold one."""
    runs: Path = Path("runs")
    """Folder of networks, curves and records."""
    preset: Literal["quarter-hour", "quarter-hour-reduced"] = "quarter-hour"
    """The preset whose rows were trained."""
    megabytes: float = 60.0
    """Size of the parcel at most, in millions of bytes."""
    file_megabytes: float = 15.0
    """Size of a file at most, in millions of bytes."""

    def __post_init__(self):
        if not (self.megabytes > 0 and self.file_megabytes > 0):
            raise InvalidInput("--megabytes and --file-megabytes must be above 0")
        if math.ceil(self.megabytes / self.file_megabytes) >= MOST_FILES:
            raise InvalidInput(
                f"{self.megabytes:g} megabytes in files of {self.file_megabytes:g} and a manifest are more "
                f"than {MOST_FILES} files: lower --megabytes or raise --file-megabytes"
            )


@dataclasses.dataclass(frozen=True)
class Receive:
    """Unpack a parcel of results into the folder of all runs.

    A row whose network is there already keeps network, record and curve.

    Example:
        python -m experiments.accelerator.parcels receive parcels --runs runs
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the parts and their manifest."""
    runs: Path = Path("runs")
    """Folder of networks, curves and records."""


def _described(name: str, options: type) -> Any:
    """Return tyro's configuration of a subcommand whose help also tells the exit statuses."""
    return tyro.conf.subcommand(name, description=f"{inspect.getdoc(options)}\n\n{statuses()}")


Command = (
    Annotated[Data, _described("data", Data)]
    | Annotated[Join, _described("join", Join)]
    | Annotated[Send, _described("send", Send)]
    | Annotated[Receive, _described("receive", Receive)]
)
ABOUT = "Pack what travels to a bare machine and back, in parts of a limited size."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status, as `command_line.exit_status` does."""

    def parse_and_run() -> None:
        given = read_flags(Command, arguments, "experiments.accelerator.parcels", description=ABOUT)
        console = text_console(soft_wrap=True)
        match given:
            case Data():
                pack_data(given, console)
            case Join():
                join_data(given, console)
            case Send():
                send(given, console)
            case Receive():
                receive(given, console)

    return exit_status(parse_and_run, "interrupted; the same command starts over")


def pack_data(options: Data, console: Console) -> None:
    """Pack CIFAR-10, unless a parcel of it that is whole lies in the folder.

    Raises:
      InvalidInput: As `load_cifar10` raises it.
    """
    most = _bytes(options.megabytes)
    with contextlib.suppress(InvalidInput):
        unpack(options.out, DATA)
        _, parts = read_manifest(options.out, DATA)
        if all(part.size <= most for part in parts):
            console.print(f"CIFAR-10 is in {options.out} already, in {len(parts)} parts")
            return
    published = load_cifar10()
    with console.status("compressing CIFAR-10"):
        content = compressed({name: getattr(published, name) for name in NAMES})
    files = pack(content, DATA, options.out, most)
    console.print(
        f"CIFAR-10 is in {options.out}: {_megabytes(len(content))} in {files - 1} parts and a manifest"
    )


def join_data(options: Join, console: Console) -> None:
    """Write CIFAR-10 into the data cache, unless it lies there.

    Raises:
      InvalidInput: Parts are missing or damaged, or the cache cannot be written to.
    """
    path = cache_dir() / NPZ_NAME
    if path.exists():
        with contextlib.suppress(CorruptData):
            read_npz(path, CIFAR10_SHA256)
            console.print(f"{path} holds CIFAR-10 already")
            return
    cached(path.stem, CIFAR10_SHA256, lambda scratch: expanded(unpack(options.folder, DATA)))
    console.print(f"{path} holds CIFAR-10 now")


def send(options: Send, console: Console) -> None:
    """Pack records, curves and the next networks, and note which networks were packed.

    Raises:
      InvalidInput: The output folder holds a parcel, nothing was trained, or the records alone do not fit.
    """
    chosen = preset(options.preset)
    home = home_of(chosen, options.runs)
    if manifest_of(options.out, RESULTS).exists():
        raise InvalidInput(f"{options.out} holds a parcel already: receive it, and name another folder")
    if not home.is_dir():
        raise InvalidInput(
            f"{home} is not there: no row of --preset {chosen.name} was trained in {options.runs}"
        )
    ledger = home / SENT
    sent = ledger.read_text(encoding="utf-8").splitlines() if ledger.exists() else []
    rows = [row for part in plan.parts(chosen) for row in part]
    kept = [folder_of(row, options.runs) / NETWORK for row in networks.trained(rows, options.runs)]
    waiting = [path for path in kept if path.exists() and str(path.relative_to(home)) not in sent]
    always = sorted(path for path in home.rglob("*") if path.suffix in RECORDS)
    content, taken = bundle(always, waiting, options.runs, _bytes(options.megabytes))
    files = pack(content, RESULTS, options.out, _bytes(options.file_megabytes))
    write_whole(ledger, "".join(f"{line}\n" for line in [*sent, *(str(p.relative_to(home)) for p in taken)]))
    left = len(waiting) - len(taken)
    console.print(
        f"{options.out}: {_megabytes(len(content))} in {files} files, with all records. "
        f"Networks: {len(taken)} packed, {left} left"
    )
    if left and not taken:
        console.print(f"None of them fits into {options.megabytes:g} megabytes: raise --megabytes.")


def bundle(
    always: Sequence[Path], waiting: Sequence[Path], root: Path, most: int
) -> tuple[bytes, list[Path]]:
    """Return a compressed archive of files, and which of those that may wait are in it.

    Args:
      always: Files that must be in it.
      waiting: Files of which each is in it that still fits, in this order.
      root: Folder to which the names in the archive are relative.
      most: Bytes of the archive at most.

    Raises:
      InvalidInput: Those that must be in it do not fit.
    """
    buffer, taken = io.BytesIO(), []
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as stream,  # networks shrink by 7 %
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for path in always:
            archive.add(path, path.relative_to(root))
        for path in waiting:
            stream.flush()
            if buffer.tell() + path.stat().st_size + BESIDE <= most:
                archive.add(path, path.relative_to(root))
                taken.append(path)
    content = buffer.getvalue()
    if len(content) > most:
        raise InvalidInput(f"the records alone take {_megabytes(len(content))}: raise --megabytes")
    return content, taken


def receive(options: Receive, console: Console) -> None:
    """Put what a parcel of results holds into the folder of all runs.

    Raises:
      InvalidInput: Parts are missing or damaged, or the archive names a place outside that folder.
    """
    content = unpack(options.folder, RESULTS)
    options.runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.runs, prefix=".parcel-") as scratch:
        try:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                archive.extractall(scratch, filter="data")
        except tarfile.TarError as error:
            raise InvalidInput(
                f"{options.folder} holds no archive that `send` has packed: {error}"
            ) from error
        brought, rows = merge(Path(scratch), options.runs)
    console.print(f"{options.runs}: networks brought: {brought}, new records of trained networks: {rows}")


def merge(brought: Path, runs: Path) -> tuple[int, int]:
    """Move the files of an unpacked parcel into the folder of all runs.

    Network, curve and record of a row stay those of one training: where there is a network already, all three
    stay. Other records and logs give way to longer ones. The records of trained networks are written last.

    Args:
      brought: Folder of what was unpacked.
      runs: Folder of all runs.

    Returns:
      How many networks the parcel has brought, and how many of its records of trained networks are new.
    """
    names = [path.relative_to(brought) for path in brought.rglob("*") if path.is_file()]
    mine = {name.parent for name in names if (runs / name.parent / NETWORK).exists()}
    came, rows = 0, 0
    for name in sorted(names, key=lambda name: name.name == TRAINED):
        new, old = brought / name, runs / name
        old.parent.mkdir(parents=True, exist_ok=True)
        if name.name == TRAINED:
            known = records.read(old)
            there = {key_of(record) for record in known}
            found = [
                record
                for record in records.read(new)
                if key_of(record) not in there or name.parent / row_folder(record) not in mine
            ]
            all_records = united(known, found)
            rows += sum(record not in known for record in all_records)
            replace(old, all_records, KEYS)
        elif name.parent not in mine and (name.name in (METRICS, NETWORK) or _is_longer(new, old)):
            os.replace(new, old)
            came += name.name == NETWORK
    return came, rows


def _is_longer(new: Path, old: Path) -> bool:
    """Tell whether a file has more bytes than another, which may be missing."""
    return not old.exists() or new.stat().st_size > old.stat().st_size


def row_folder(record: records.Record) -> Path:
    """Return the folder of a trained row within that of its preset, as `folder_of` names it."""
    return folder_name(*(record[key] for key in (*KEYS, "digest")))


def _bytes(megabytes: float) -> int:
    return int(1e6 * megabytes)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
