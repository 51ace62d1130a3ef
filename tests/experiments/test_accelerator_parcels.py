"""Pack, damage, join and receive parcels of toy images and of made-up networks."""

import io
import os
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement

from experiments.accelerator import lossless, packing, parcels, plan
from experiments.configs.study import preset
from experiments.data import store
from experiments.data.dataset import PublishedSet
from experiments.paper.collect import KEYS, replace
from experiments.paper.rows import METRICS, NETWORK, TRAINED, folder_of
from qt_jax import records
from qt_jax.errors import InvalidInput

ACCELERATOR = Path(parcels.__file__).parent
NAME = "quarter-hour-reduced"
ROWS = [row for part in plan.parts(preset(NAME)) for row in part]
NETWORK_BYTES = 10_000
in_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@in_a_folder
@given(content=st.binary(max_size=50), most=st.integers(1, 60))
def test_what_is_packed_comes_out(tmp_path, content, most):
    files = packing.pack(content, "it", tmp_path, most)
    assert packing.unpack(tmp_path, "it") == content
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(sizes) == files, "parts of an earlier parcel are left"
    assert all(size <= most for name, size in sizes.items() if name != "it.json")


def test_parcels_of_two_names_share_a_folder(tmp_path):
    packing.pack(b"data", "data", tmp_path, 2)
    packing.pack(b"results", "results", tmp_path, 2)
    assert packing.unpack(tmp_path, "data") == b"data"
    assert packing.unpack(tmp_path, "results") == b"results"


@in_a_folder
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 3))
def test_a_flipped_bit_is_seen(tmp_path, place, bit, which):
    content = bytes(range(250))
    packing.pack(content, "it", tmp_path, 100)
    path = sorted(tmp_path.iterdir())[which]
    damaged = bytearray(path.read_bytes())
    damaged[int(place * len(damaged))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        assert packing.unpack(tmp_path, "it") == content, "only a space of the manifest may change"
    except InvalidInput as error:
        assert "again" in str(error) and ("damaged" in str(error) or "missing" in str(error))


def test_missing_and_damaged_parts_are_named_in_one_sentence(tmp_path):
    packing.pack(bytes(450), "it", tmp_path, 100)
    (tmp_path / "it.01").unlink()
    (tmp_path / "it.04").unlink()
    (tmp_path / "it.02").write_bytes(bytes(99))
    with pytest.raises(InvalidInput) as caught:
        packing.unpack(tmp_path, "it")
    assert str(caught.value) == (
        f"{tmp_path}: it.01 is missing, it.02 is damaged, it.04 is missing, of 5 parts: "
        "bring them and it.json again"
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "{", '{"whole": 1, "parts": []}', '{"whole": {}, "parts": []}']
)
def test_a_manifest_that_is_none(text, tmp_path):
    with pytest.raises(InvalidInput, match=r"it\.json is missing: bring"):
        packing.unpack(tmp_path, "it")
    (tmp_path / "it.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"it\.json is damaged: bring"):
        packing.unpack(tmp_path, "it")


def toy(images=130, side=8):
    """Return a set of random images, as `load_cifar10` would."""
    rng = np.random.default_rng(0)
    arrays = store.as_arrays(
        rng.integers(0, 256, (images, side, side, 3)),
        rng.integers(0, 10, images),
        rng.integers(0, 256, (7, side, side, 3)),
        rng.integers(0, 10, 7),
    )
    return PublishedSet(**arrays, mean=(0.5,) * 3, std=(0.5,) * 3, class_names=tuple("abcdefghij"))


def arrays_of(published):
    return {name: getattr(published, name) for name in store.NAMES}


@pytest.mark.parametrize("images", [1, lossless.STRIP, lossless.STRIP + 1])
def test_compression_loses_nothing(images):
    arrays = arrays_of(toy(images))
    back = lossless.expanded(lossless.compressed(arrays))
    assert store.digest(back) == store.digest(arrays)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Make a toy the published CIFAR-10, and return the folder of an empty data cache."""
    published = toy()
    monkeypatch.setattr(parcels, "load_cifar10", lambda: published)
    monkeypatch.setattr(parcels, "CIFAR10_SHA256", store.digest(arrays_of(published)))
    monkeypatch.setenv("QT_JAX_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pack_data(folder, megabytes="0.01"):
    return parcels.main(["data", "--out", str(folder), "--megabytes", megabytes])


def test_data_come_out_of_parts_as_they_were(cifar, tmp_path, capsys):
    assert pack_data(tmp_path / "there") == 0
    parts = sorted((tmp_path / "there").glob("cifar10.[0-9]*"))
    assert len(parts) > 2 and all(part.stat().st_size <= 10_000 for part in parts)
    assert parcels.main(["join", str(tmp_path / "there")]) == 0
    assert store.read_npz(cifar / "cifar10.npz", parcels.CIFAR10_SHA256)
    assert "holds CIFAR-10 now" in capsys.readouterr().out


def test_data_are_packed_once(cifar, tmp_path, monkeypatch, capsys):
    assert pack_data(tmp_path / "there") == 0
    monkeypatch.setattr(parcels, "load_cifar10", lambda: pytest.fail("must not be packed again"))
    assert pack_data(tmp_path / "there") == pack_data(tmp_path / "there", "0.02") == 0
    assert "already" in capsys.readouterr().out
    monkeypatch.setattr(parcels, "load_cifar10", toy)
    assert pack_data(tmp_path / "there", "0.005") == 0
    assert all(part.stat().st_size <= 5000 for part in (tmp_path / "there").glob("cifar10.[0-9]*"))


def test_join_leaves_a_good_cache_alone(cifar, tmp_path, capsys):
    store.write_npz(cifar / "cifar10.npz", arrays_of(toy()))
    before = (cifar / "cifar10.npz").stat()
    assert parcels.main(["join", str(tmp_path / "absent")]) == 0
    assert (cifar / "cifar10.npz").stat() == before
    assert "holds CIFAR-10 already" in capsys.readouterr().out


def test_join_mends_a_damaged_cache(cifar, tmp_path):
    pack_data(tmp_path / "there")
    cifar.mkdir()
    (cifar / "cifar10.npz").write_bytes(b"damaged")
    assert parcels.main(["join", str(tmp_path / "there")]) == 0
    assert store.read_npz(cifar / "cifar10.npz", parcels.CIFAR10_SHA256)


def test_join_without_a_part_writes_nothing(cifar, tmp_path, capsys):
    pack_data(tmp_path / "there")
    (tmp_path / "there" / "cifar10.01").unlink()
    assert parcels.main(["join", str(tmp_path / "there")]) == 2
    assert "cifar10.01 is missing" in capsys.readouterr().err
    assert list(cifar.iterdir()) == []


def test_join_refuses_other_data(cifar, tmp_path, monkeypatch, capsys):
    pack_data(tmp_path / "there")
    monkeypatch.setattr(parcels, "CIFAR10_SHA256", "0" * 64)
    assert parcels.main(["join", str(tmp_path / "there")]) == 2
    assert "other data than published" in capsys.readouterr().err
    assert list(cifar.iterdir()) == []


def record_of(row, **values):
    known = {"task": row.task.name, "method": row.name, "seed": row.seed, "digest": row.digest}
    return known | {"status": "ok"} | values


def make_up(runs, rows, date="first", size=NETWORK_BYTES):
    """Write networks that cannot be compressed, curves, records and logs of rows."""
    home = runs / f"paper-{NAME}"
    home.mkdir(parents=True, exist_ok=True)
    for row in rows:
        folder = folder_of(row, runs)
        folder.mkdir(parents=True)
        (folder / NETWORK).write_bytes(
            np.random.default_rng([*row.digest.encode(), *date.encode()]).bytes(size)
        )
        (folder / METRICS).write_text(f'{{"date": "{date}"}}\n')
        records.append(home / TRAINED, record_of(row, date=date))
    (home / "step-vit.log").write_text(f"log of the {date}\n")
    return home


def send(runs, out, *flags):
    return parcels.main(["send", "--runs", str(runs), "--out", str(out), "--preset", NAME, *flags])


def receive(folder, runs):
    return parcels.main(["receive", str(folder), "--runs", str(runs)])


def networks_in(runs):
    return {path.relative_to(runs) for path in runs.rglob(NETWORK)}


def expected_networks(rows):
    return {(folder_of(row, Path()) / NETWORK) for row in rows}


SMALL = ("--megabytes", "0.085", "--file-megabytes", "0.02")
"""Room for five made-up networks with records, and for what `bundle` leaves free."""


def test_networks_come_home_in_the_order_of_their_worth(tmp_path, capsys):
    rows, runs, home = ROWS[:7], tmp_path / "runs", tmp_path / "home"
    make_up(runs, list(reversed(rows)))
    for turn, (there, left) in enumerate([(5, 2), (7, 0), (7, 0)]):
        out = tmp_path / f"out{turn}"
        assert send(runs, out, *SMALL) == 0
        assert f"{left} left" in capsys.readouterr().out
        assert len(list(out.iterdir())) <= 8
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", path.name) for path in out.iterdir())
        assert all(path.stat().st_size <= 20_000 for path in out.iterdir())
        assert sum(path.stat().st_size for path in out.glob("results.[0-9]*")) <= 85_000
        assert receive(out, home) == 0
        assert networks_in(home) == expected_networks(rows[:there])
    for name in networks_in(runs):
        assert (home / name).read_bytes() == (runs / name).read_bytes()
        assert (home / name.parent / METRICS).read_bytes() == (runs / name.parent / METRICS).read_bytes()
    assert {r["digest"] for r in records.read(home / f"paper-{NAME}" / TRAINED)} == {r.digest for r in rows}
    assert (home / f"paper-{NAME}" / "step-vit.log").exists()


def test_records_come_home_before_their_networks(tmp_path):
    rows, runs, home = ROWS[:7], tmp_path / "runs", tmp_path / "home"
    make_up(runs, rows)
    assert send(runs, tmp_path / "out", *SMALL) == receive(tmp_path / "out", home) == 0
    assert len(networks_in(home)) < len(records.read(home / f"paper-{NAME}" / TRAINED)) == len(rows)
    assert all((folder_of(row, home) / METRICS).exists() for row in rows)


def test_a_parcel_that_was_not_written_counts_as_not_sent(tmp_path, monkeypatch):
    home = make_up(tmp_path / "runs", ROWS[:2])

    def full_disk(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(parcels, "pack", full_disk)
        with pytest.raises(OSError, match="no space"):
            send(tmp_path / "runs", tmp_path / "out")
    assert not (home / parcels.SENT).exists()
    assert send(tmp_path / "runs", tmp_path / "out") == receive(tmp_path / "out", tmp_path / "home") == 0
    assert len(networks_in(tmp_path / "home")) == 2


def test_only_networks_that_have_a_record_are_sent(tmp_path):
    home = make_up(tmp_path / "runs", ROWS[:2])
    (home / TRAINED).write_text("")
    records.append(home / TRAINED, record_of(ROWS[1]))
    assert send(tmp_path / "runs", tmp_path / "out") == receive(tmp_path / "out", tmp_path / "home") == 0
    assert networks_in(tmp_path / "home") == expected_networks(ROWS[1:2])


def test_a_network_that_never_fits_stops_no_other(tmp_path, capsys):
    runs = tmp_path / "runs"
    make_up(runs, ROWS[:1], size=100_000)
    make_up(runs, ROWS[1:2])
    assert send(runs, tmp_path / "one", *SMALL) == 0
    assert "1 packed, 1 left" in capsys.readouterr().out
    assert send(runs, tmp_path / "two", *SMALL) == 0
    assert "0 packed, 1 left" in (said := capsys.readouterr().out) and "raise --megabytes" in said


def test_a_parcel_on_its_way_is_not_overwritten(tmp_path, capsys):
    make_up(tmp_path / "runs", ROWS[:1])
    assert send(tmp_path / "runs", tmp_path / "out") == 0
    assert send(tmp_path / "runs", tmp_path / "out") == 2
    assert "holds a parcel already" in capsys.readouterr().err


def test_nothing_to_send(tmp_path, capsys):
    assert send(tmp_path / "runs", tmp_path / "out") == 2
    assert "no row" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--megabytes", "120"), "more than 8 files"),
        (("--megabytes", "0"), "must be above 0"),
        (("--megabytes", "0.0001", "--file-megabytes", "0.0001"), "the records alone take"),
    ],
)
def test_sizes_that_do_not_work(flags, said, tmp_path, capsys):
    make_up(tmp_path / "runs", ROWS[:1])
    try:
        status = send(tmp_path / "runs", tmp_path / "out", *flags)
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and said in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert not (tmp_path / "out").exists()


def test_received_records_replace_those_of_their_rows_alone(tmp_path):
    home = make_up(tmp_path / "home", ROWS[:2])
    (folder_of(ROWS[1], tmp_path / "home") / NETWORK).unlink()
    make_up(tmp_path / "runs", ROWS[1:3], date="second")
    assert send(tmp_path / "runs", tmp_path / "out") == receive(tmp_path / "out", tmp_path / "home") == 0
    dates = {record["digest"]: record["date"] for record in records.read(home / TRAINED)}
    assert dates == {ROWS[0].digest: "first", ROWS[1].digest: "second", ROWS[2].digest: "second"}
    assert "second" in (folder_of(ROWS[1], tmp_path / "home") / METRICS).read_text()
    assert [(home / "step-vit.log").read_text()] == ["log of the second\n"], "the longer one"
    (home / "step-vit.log").write_text("an even longer log of the third\n")
    assert receive(tmp_path / "out", tmp_path / "home") == 0
    assert "third" in (home / "step-vit.log").read_text()


def test_a_failure_elsewhere_replaces_no_trained_network(tmp_path):
    home = make_up(tmp_path / "home", ROWS[:1])
    there = make_up(tmp_path / "runs", ROWS[:1], date="second")
    for folder in ("home", "runs"):
        (folder_of(ROWS[0], tmp_path / folder) / NETWORK).unlink()
    (record,) = records.read(there / TRAINED)
    replace(there / TRAINED, [record | {"status": "crashed"}], KEYS)
    assert send(tmp_path / "runs", tmp_path / "out") == receive(tmp_path / "out", tmp_path / "home") == 0
    assert [(r["status"], r["date"]) for r in records.read(home / TRAINED)] == [("ok", "first")]


def test_network_curve_and_record_stay_those_of_one_training(tmp_path):
    """Another machine has trained a row again whose network is at home already."""
    row, runs, home = ROWS[0], tmp_path / "runs", tmp_path / "home"
    make_up(home, [row])
    there = make_up(runs, [row], date="second")
    (there / parcels.SENT).write_text(f"{(folder_of(row, runs) / NETWORK).relative_to(there)}\n")
    assert send(runs, tmp_path / "without") == receive(tmp_path / "without", home) == 0
    assert [record["date"] for record in records.read(home / f"paper-{NAME}" / TRAINED)] == ["first"]
    assert "first" in (folder_of(row, home) / METRICS).read_text()
    (there / parcels.SENT).unlink()
    assert send(runs, tmp_path / "with") == receive(tmp_path / "with", home) == 0
    assert [record["date"] for record in records.read(home / f"paper-{NAME}" / TRAINED)] == ["first"]
    assert "first" in (folder_of(row, home) / METRICS).read_text()
    (folder_of(row, home) / NETWORK).unlink()
    assert receive(tmp_path / "with", home) == 0
    assert [record["date"] for record in records.read(home / f"paper-{NAME}" / TRAINED)] == ["second"]
    assert "second" in (folder_of(row, home) / METRICS).read_text()
    assert networks_in(home) == networks_in(runs)


def test_a_damaged_parcel_changes_nothing(tmp_path, capsys):
    make_up(tmp_path / "runs", ROWS[:1])
    assert send(tmp_path / "runs", tmp_path / "out") == 0
    (tmp_path / "out" / "results.00").write_bytes(b"")
    assert receive(tmp_path / "out", tmp_path / "home") == 2
    assert "results.00 is damaged" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_no_file_leaves_the_folder_of_runs(tmp_path, capsys):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../outside"))
    packing.pack(buffer.getvalue(), parcels.RESULTS, tmp_path / "out", 10_000)
    assert receive(tmp_path / "out", tmp_path / "home") == 2
    assert "no archive that `send` has packed" in capsys.readouterr().err
    assert [*tmp_path.rglob("outside"), *(tmp_path / "home").iterdir()] == []


def test_folders_of_records_are_those_of_their_rows():
    for row in ROWS:
        assert folder_of(row, Path()) == Path(f"paper-{NAME}") / parcels.row_folder(record_of(row))


def test_wheels_are_versions_that_the_project_allows():
    pins = {}
    for path in (ACCELERATOR / "wheels.txt", ACCELERATOR.parents[1] / "requirements.txt"):
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        pins[path.name] = {it.name: it.specifier for it in map(Requirement, lines)}
    for name, specifier in pins["wheels.txt"].items():
        [pin] = specifier
        assert pin.operator == "=="
        assert pins["requirements.txt"].get(name, specifier).contains(pin.version), name


STUB = """#!/bin/bash
[[ $1 == - ]] && cat >/dev/null
echo "$*" >>calls
[[ $2 == experiments.accelerator ]] && exit 7
exit 0
"""


def start(folder, *arguments, **environment):
    """Run start.sh with a python3 that notes how it is called, and fails to train."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").write_text(STUB)
    (folder / "bin" / "python3").chmod(0o755)
    script = folder / "experiments" / "accelerator" / "start.sh"
    script.parent.mkdir(parents=True)
    script.write_bytes((ACCELERATOR / "start.sh").read_bytes())
    environment |= {"PATH": f"{folder / 'bin'}:{os.defpath}", "TMPDIR": str(folder)}
    done = subprocess.run(
        ["bash", script, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    calls = folder / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_results_are_packed_when_training_has_failed(tmp_path):
    (tmp_path / "carried").mkdir()
    flags = ("--preset", NAME, "--runs=elsewhere", "--minutes", "5")
    done, calls = start(tmp_path, "carried", *flags, OUT="way home")
    assert done.returncode == 7 and done.stderr == ""
    assert calls[-2:] == [
        f"-m experiments.accelerator {' '.join(flags)}",
        f"-m experiments.accelerator.parcels send --out way home --preset {NAME} --runs elsewhere",
    ]
    assert not list(tmp_path.glob("tmp.*")), "a scratch folder is left"


def test_nothing_is_packed_without_a_way_home(tmp_path):
    (tmp_path / "carried").mkdir()
    done, calls = start(tmp_path, "carried")
    assert done.returncode == 7 and calls[-1] == "-m experiments.accelerator"


@pytest.mark.parametrize(("arguments", "said"), [((), "name the folder"), (("absent",), "is not there")])
def test_start_says_what_it_lacks(arguments, said, tmp_path):
    done, calls = start(tmp_path, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("start.sh: ") and said in done.stderr
    assert done.stderr.count("\n") == 1 and not calls
