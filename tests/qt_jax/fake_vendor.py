"""Fail in the way that the scheme is named after, as a vendor's toolchain that workers load."""

import ctypes
import os
import subprocess
import time
from pathlib import Path

import numpy as np

from qt_jax.backends.protocol import Compiled, Refused, Runtime, Scheme

COMPILE_FAULTS = ("refused", "exit", "segfault", "hang", "allocation", "silent", "reply", "not-a-number")
RUN_FAULTS = ("nan", "shape", "garbage", "run-crash", "exact")


class Fake:
    name, vendor, stands_for, kind = "fake", "Nobody", "nothing", "vendor simulator"
    environment = None
    packages = ("numpy",)
    schemes = tuple(Scheme(name, 8, 8, False, "minmax") for name in COMPILE_FAULTS + RUN_FAULTS)
    runtimes = (Runtime("simulator", "in numpy", batch=7, simulated=True),)

    def available(self):
        return None

    def compile(self, source, calibration, scheme, folder):
        print(f"compiling {scheme.name} with {len(calibration)} images", flush=True)
        if scheme.name == "refused":
            raise Refused("operator Foo is unknown to this tool")
        if scheme.name == "exit":
            print("licence expired", flush=True)
            os._exit(3)
        if scheme.name == "segfault":
            ctypes.string_at(0)
        if scheme.name == "hang":
            child = subprocess.Popen(["sleep", "1000"])
            (folder / "child").write_text(str(child.pid))
            print(child.pid, flush=True)
            time.sleep(1000)
        if scheme.name == "allocation":
            np.ones(100 * 2**30, np.uint8)
        if scheme.name == "silent":
            os._exit(0)
        if scheme.name == "reply":
            Path("../reply.json").write_bytes(b'{"seconds": 1, "result": 7}')
            os._exit(0)
        (folder / "program").write_bytes(b"1234")
        cycles = float("nan") if scheme.name == "not-a-number" else 42
        return Compiled(4, {"Conv": {"integer": 2, "float": 0}}, {"cycles": cycles})

    def load(self, folder, scheme, runtime):
        assert (folder / "program").read_bytes() == b"1234"
        fault = scheme.name

        def session(images):
            assert len(images) <= runtime.batch
            logits = np.tile(images.reshape(len(images), -1).sum(axis=1)[:, None], (1, 4))
            logits *= np.arange(4, dtype=np.float32)
            if fault == "nan":
                logits[0] = np.nan
            if fault == "garbage":
                return np.full(logits.shape, "\ufffd garbage")
            if fault == "run-crash":
                raise RuntimeError("device lost")
            return logits[:, :2] if fault == "shape" else logits

        return session


BACKEND = Fake()
