"""A real Slurm for the tests marked ``cluster``: started here where Debian's packages are."""

import importlib.util
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]

NEEDED = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
END_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Slurm:
    """Two nodes, n1 and n2, on this host."""

    environment: dict[str, str]

    def __call__(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=self.environment, cwd=CHECKOUT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, script: Path, *options: str) -> str:
        """The number of a batch job; what it prints is in ``SCRIPT.log``."""
        log = f"--output={script}.log"
        return self("sbatch", "--parsable", "--open-mode=append", log, *options, str(script))

    def facts(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by its names."""
        words = self("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(
        self, job: str, until: Callable[[dict[str, str]], bool] | None = None, seconds: int = 300
    ) -> dict[str, str]:
        """A job's facts when it has ended, or when ``until`` says so."""
        for _ in range(5 * seconds):
            facts = self.facts(job)
            if facts["JobState"] in END_STATES or (until is not None and until(facts)):
                return facts
            time.sleep(0.2)
        raise TimeoutError(f"job {job} is {facts['JobState']} after {seconds} s")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Slurm while these tests run."""
    missing = [name for name in NEEDED if shutil.which(name, path=search_path()) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    folder = tmp_path_factory.mktemp("slurm")
    environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf")}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run([HERE / "start_slurm.sh", folder], env=environment, check=True)
        yield Slurm(environment)
    finally:
        subprocess.run([HERE / "stop_slurm.sh", folder], env=environment, check=True)


def search_path() -> str:
    """Where programs are, root's included."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@pytest.fixture(scope="session")
def ray() -> None:
    """Skips where Hydra's launcher for Ray is not installed."""
    for package in ("ray", "hydra_plugins.hydra_ray_launcher"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"no {package} here: pip install 'clinfuse[ray]'")
