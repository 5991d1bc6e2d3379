"""Forks of the test's process, new interpreters, and programs that it starts."""

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch_s3


def in_child(check, seconds=30):
    """Run ``check`` in a fork of this process: its exit status, 0 when it returned, -SIGALRM when it took longer."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            gc.freeze()  # other tests' garbage, s3fs's sessions among it, can hang where it is collected after fork
            check()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_new_process(function, *args, seconds=100):
    """What a module's function returns or raises in an interpreter without other tests' threads and memory.

    A process that is killed meanwhile, or is not done in time, is a BrokenProcessPool.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        future = pool.submit(function, *args)
        (process,) = pool._processes.values()
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            return future.result()
        finally:
            timer.cancel()


@contextlib.contextmanager
def measured_peak():
    """What tells by how many bytes this process has grown at most since the block began. Linux only."""

    def peak():  # ru_maxrss would start with that of the process before exec
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak()
    yield lambda: peak() - before


@contextlib.contextmanager
def program(text, storage_options):
    """A process that runs ``text``, with a filesystem ``fs`` of these options; killed at the block's end."""
    before = f"""
        import sys, types
        package = sys.modules["torch_s3"] = types.ModuleType("torch_s3")  # without torch, which takes seconds to import
        package.__path__ = [{str(Path(torch_s3.__file__).parent)!r}]
        from torch_s3.filesystem import S3FileSystem
        fs = S3FileSystem(**{storage_options})
    """
    command = [sys.executable, "-c", textwrap.dedent(before) + textwrap.dedent(text)]
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
