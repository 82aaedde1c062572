"""Probes that behave, and probes that do everything a probe should not. Nothing here imports torch."""

import os
import signal
import subprocess
import sys
import time


def works() -> None:
    pass


def half_works() -> dict[str, str]:
    return {"attention": "1.2"}


def aborts() -> None:
    print("the last words", file=sys.stderr, flush=True)
    os.abort()


def segfaults() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def sleeps() -> None:
    while True:
        time.sleep(3600)


def raises() -> None:
    raise RuntimeError("no kernel image is available\x1b[31m for this device\nsecond line")


def raises_out_of_memory() -> None:
    counts()
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 MiB")


def leaves() -> None:
    sys.exit(3)


def vanishes() -> None:
    os._exit(0)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs_at_exit() -> None:
    import atexit

    atexit.register(sleeps)


def counted() -> None:
    """Writes down that it ran, and takes long enough for others to come in between."""
    counts()
    time.sleep(0.3)


def counts() -> None:
    with open(os.environ["COUNTER"], "a") as file:
        file.write("x")


def prints_megabytes() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.write("x" * 1023 + "\n")
    os.write(1, b"y" * (8 << 20))
    os.write(2, b"y" * (8 << 20))
    input_ended = sys.stdin.read() == ""
    assert input_ended


def floods_stderr() -> None:
    for _ in range(40):
        os.write(2, b"z" * (1 << 20))
        time.sleep(0.025)
    raise RuntimeError(f"stderr holds {os.fstat(2).st_size}")


def spawns() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    with open(os.environ["GRANDCHILD"], "w") as file:
        file.write(str(child.pid))


def spawns_and_sleeps() -> None:
    spawns()
    sleeps()


def starts_python() -> None:
    subprocess.run([sys.executable, "-c", "import calls"], check=True)


def tells_its_world() -> None:
    shadowed = [name for name in sys.modules if name in ("lz_compile", "torch")]
    own_folder = [entry for entry in sys.path if entry.endswith("lz_compile")]
    raise RuntimeError(f"imported {shadowed}, folders {own_folder}, cwd holds {sorted(os.listdir('.'))}")
