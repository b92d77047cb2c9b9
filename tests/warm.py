"""Command lines without the seconds that each would take to import torch: for ``conftest``.

A process that has imported what others wrote, and nothing of ours, reads ``python -m`` commands
from its input, a line of JSON each, runs each as a fork and answers with its exit status. What a
command imports of clinfuse, it imports itself.
"""

import atexit
import importlib
import json
import os
import runpy
import sys
import threading
import traceback

IMPORTED = (
    *("torch", "torch._dynamo", "lightning", "torchmetrics", "hydra", "omegaconf", "jinja2"),
    *("monai.losses", "monai.metrics", "monai.networks.nets", "monai.transforms", "torchio"),
    *("matplotlib.pyplot", "nibabel", "numba", "pandas", "ptwt", "pydicom", "rich", "wandb"),
    *("scipy.ndimage", "scipy.stats", "safetensors", "SimpleITK"),
)


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            run(**asked)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(
    module: str, arguments: list[str], folder: str, environment: dict[str, str], said: list[str]
) -> None:
    """``python -m MODULE ARGUMENTS`` in ``folder``, its two streams into the files ``said``."""
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, path in enumerate(said, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # the two that the interpreter calls when it ends, in their order
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
