"""Check that provenance names versions, machine and commit, and does not claim what it cannot know."""

import re
import subprocess

from qt_jax import provenance


def test_provenance_names_versions_and_time():
    found = provenance.provenance(["numpy", "no-such-package"])
    assert found["versions"]["numpy"].count(".") == 2 and found["versions"]["no-such-package"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    assert found["accelerator"] is None and found["command"]


def test_cpu_flags_of_x86_and_arm_and_of_no_file(tmp_path):
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni\n")
    arm.write_text("Features\t: fp asimd asimddp\n")
    assert provenance.cpu(x86)["model"] == "Some CPU"
    assert provenance.cpu(x86)["flags"] == ["avx2", "avx512f", "avx512_vnni"]
    assert provenance.cpu(arm)["flags"] == ["asimd", "asimddp"]
    assert provenance.cpu(tmp_path / "none")["flags"] is None


def test_commit_is_that_of_the_repository_which_tracks_the_file(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    tracked, stray = tmp_path / "tracked.py", tmp_path / "stray.py"
    tracked.write_text("1")
    stray.write_text("1")
    assert provenance.commit(tracked) is None
    git("init")
    git("add", "tracked.py")
    git("commit", "-m", "first")
    provenance.commit.cache_clear()
    assert re.fullmatch("[0-9a-f]{40}", provenance.commit(tracked))
    assert provenance.commit(stray) is None
    tracked.write_text("2")
    provenance.commit.cache_clear()
    assert provenance.commit(tracked).endswith("-dirty")
