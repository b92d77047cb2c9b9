"""What every test shares: quiet libraries, a seed, small phantoms, and configurations of them."""

import importlib
import importlib.util
import json
import locale
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from hypothesis import settings
from omegaconf import DictConfig, open_dict

if TYPE_CHECKING:  # jaxtyping checks what is imported after this file: clinfuse waits for a fixture
    from clinfuse.data.paired_volumes import PairedVolumes
    from clinfuse.types import FusionBatch

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "disabled")

# The first call of a jitted or imported library takes seconds: time is no property of our maths.
# Built on the profile in force, so that under CI hypothesis stays derandomised.
settings.register_profile("clinfuse", settings(), deadline=None)
settings.load_profile("clinfuse")

CHARACTERS = locale.setlocale(locale.LC_CTYPE)
"""What text is made of where the tests run: UTF-8, nearly everywhere."""

CHECKOUT = Path(__file__).resolve().parents[1]

SMOKE = ("experiment=smoke", "data.prepare.workers=1")
"""Eight heads of 16 x 32 x 32 voxels and a network of two narrow levels."""

RUN = (
    *SMOKE,
    "trainer.max_epochs=3",  # of four steps each
    "trainer.check_val_every_n_epoch=3",
    "trainer.log_every_n_steps=1",
    "method.steps=2",
    "method.members=2",
)
"""A training of seconds that visits everything: three stages, a validation, a test."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from one seed, so that neither order nor selection changes a result."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    """What Lightning, Hydra and ITK set for the whole process is put back after every test.

    ITK's DICOM writer leaves the locale C behind, in which text is ASCII by default.
    """
    environment = dict(os.environ)
    locale.setlocale(locale.LC_CTYPE, CHARACTERS)  # a fixture of the module may have been before us
    yield
    locale.setlocale(locale.LC_CTYPE, CHARACTERS)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
    HydraConfig.instance().cfg = None
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images that may be tested on but not redistributed; skips where absent.

    It is ``$CLINFUSE_DATA`` or, when that is not set, ``../shared/data`` beside the checkout.
    """
    folder = Path(os.environ.get("CLINFUSE_DATA", CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real images not found at {folder}: set CLINFUSE_DATA to their folder")
    return folder


@dataclass
class Phantoms:
    """The smoke experiment's heads on disk, made once a session, and configurations of them."""

    cache_dir: Path
    smoke: tuple[str, ...] = SMOKE
    run: tuple[str, ...] = RUN

    def config(
        self, *overrides: str, name: str = "train", folder: Path | None = None
    ) -> DictConfig:
        """What the entry point ``name`` would get for these overrides, run in ``folder``.

        Hydra's own part is set for the process and its folder made, as ``hydra.main`` does it.
        """
        from clinfuse.configuration import CONFIG_PATH, register_resolvers

        register_resolvers()
        task = [f"cache_dir={self.cache_dir}", *overrides]
        folder = self.cache_dir / "unused" if folder is None else folder
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        with initialize_config_dir(config_dir=CONFIG_PATH, version_base="1.3"):
            output = f"hydra.runtime.output_dir={folder}"
            cfg = compose(name, [*task, output], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg

    @cached_property
    def root(self) -> Path:
        """Folder of the cohort."""
        return self.data().root

    def data(self, *overrides: str) -> "PairedVolumes":
        """The data module of the smoke experiment, its heads on disk."""
        data = instantiate(self.config(*SMOKE, *overrides).data, _convert_="all")
        data.prepare_data()
        return data

    def batch(self, amplitude_mm: float = 2.0, case: int = 0) -> "FusionBatch":
        """One of the heads, its CT moved by ``amplitude_mm`` and turned by as many degrees."""
        from clinfuse.data.jitter import fixed_misregistration
        from clinfuse.data.paired_volumes import study_item
        from clinfuse.data.studies import load_study

        study = load_study(self.root / f"case_{case:03d}")
        return study_item(study, fixed_misregistration(study.case_id, amplitude_mm, amplitude_mm))

    def method(self, name: str, *overrides: str, steps: int = 2, members: int = 2) -> Any:
        """A method by its configuration's name, untrained, its weights drawn from one seed.

        One that samples does so in a few ``steps`` with a few ``members``.
        """
        from clinfuse.configuration import build_method

        cfg = self.config(*SMOKE, f"method={name}", *overrides)
        if "steps" in cfg.method:
            cfg.method.steps, cfg.method.members = steps, members
        torch.manual_seed(0)
        return build_method(cfg)


@dataclass
class CommandLine:
    """Entry points run as a user runs them, their libraries already imported (``warm.py``)."""

    folder: Path

    @cached_property
    def _warm(self) -> Popen[str]:
        command = [sys.executable, str(CHECKOUT / "tests" / "warm.py")]
        return Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=self.folder)

    def __call__(
        self, module: str, *arguments: str, cwd: Path = CHECKOUT, **environment: str
    ) -> CompletedProcess[str]:
        """``python -m MODULE ARGUMENTS`` in ``cwd``, as ``subprocess.run`` answers."""
        said = [self.folder / stream for stream in ("stdout", "stderr")]
        asked = {
            "module": module,
            "arguments": arguments,
            "folder": str(cwd),
            "environment": {**os.environ, **environment},
            "said": [str(path) for path in said],
        }
        print(json.dumps(asked), file=self._warm.stdin, flush=True)
        status = int(self._warm.stdout.readline())
        return CompletedProcess([module, *arguments], status, *(p.read_text() for p in said))

    def cold(self, module: str, *arguments: str, **environment: str) -> CompletedProcess[str]:
        """The same in an interpreter of its own, from its first import on."""
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=CHECKOUT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )

    def end(self) -> None:
        if "_warm" in vars(self):
            self._warm.communicate()


@pytest.fixture(scope="session")
def entry_point(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """Runs ``python -m MODULE ARGUMENTS``."""
    commands = CommandLine(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.end()


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a training of ``RUN`` from the command line, made once for all workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "smoke_run"
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.html").is_file():
            overrides = (*RUN, f"cache_dir={base / 'smoke_cache'}", f"hydra.run.dir={folder}")
            command = [sys.executable, "-m", "clinfuse.train", *overrides]
            done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Phantoms:
    """Small heads, drawn once a session."""
    return Phantoms(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def piq_fsim() -> Callable[..., torch.Tensor]:
    """FSIM as piq computes it, loaded without the rest of piq, whose __init__ wants torchvision."""
    spec = importlib.util.find_spec("piq")
    if spec is None:
        pytest.skip("piq is not installed: pip install --no-deps piq")
    package = ModuleType("piq")
    package.__path__ = list(spec.submodule_search_locations or ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "piq", package)
        return importlib.import_module("piq.fsim").fsim


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
