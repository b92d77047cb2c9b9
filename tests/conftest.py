"""What every test shares: quiet libraries, a seed, and the way to the shared real images."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "disabled")

# The first call of a jitted or imported library takes seconds: time is no property of our maths.
# Built on the profile in force, so that under CI hypothesis stays derandomised.
settings.register_profile("clinfuse", settings(), deadline=None)
settings.load_profile("clinfuse")

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from one seed, so that neither order nor selection changes a result."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images that may be tested on but not redistributed; skips where absent.

    It is ``$CLINFUSE_DATA`` or, when that is not set, ``../shared/data`` beside the checkout.
    """
    folder = Path(os.environ.get("CLINFUSE_DATA", CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real images not found at {folder}: set CLINFUSE_DATA to their folder")
    return folder


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
