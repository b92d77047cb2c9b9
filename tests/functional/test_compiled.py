import os
import subprocess
import sys

import pytest
from numba import njit

from clinfuse.functional.compiled import compiled


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same():
    nowhere: dict = {}
    exec("def twice(x): return 2 * x", nowhere)
    with pytest.raises(RuntimeError, match="cannot cache"):
        njit(cache=True)(nowhere["twice"])
    assert compiled(nowhere["twice"])(21) == 42


@pytest.mark.slow  # each compiles for seconds
def test_processes_that_compile_at_once_share_what_they_keep(tmp_path):
    script = (
        "import numpy as np; from clinfuse.functional import fmi_cpu; "
        "print(fmi_cpu.window_scores(*np.random.default_rng(0).random((2, 1, 9, 9), np.float32)))"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs) == 1
    assert len(list(tmp_path.rglob("*.nbi"))) == 1
