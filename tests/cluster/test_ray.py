"""A sweep on a real Ray, started on this machine by Hydra's launcher."""

import pandas as pd
import pytest

pytestmark = pytest.mark.cluster


def test_a_sweep_gives_the_table_that_it_gives_without(ray, entry_point, phantoms, tmp_path):
    def swept(folder, *launcher):
        done = entry_point(
            "clinfuse.train", "-m", "experiment=smoke", "scale=none", "sweep=methods",
            "method=average,weighted,maximum,laplacian_pyramid,wavelet,deterministic_unet",
            "table.ours=wavelet", "callbacks.progress=null", "trainer.accelerator=cpu",
            "trainer.precision=32-true",
            f"cache_dir={phantoms.cache_dir}", f"hydra.sweep.dir={tmp_path / folder}", *launcher,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = pd.read_csv(tmp_path / folder / "table" / "cases.csv")
        return rows[rows["metric"] != "seconds"].reset_index(drop=True)

    assert phantoms.root.is_dir()
    alone = swept("local")
    together = swept("ray", "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2")
    pd.testing.assert_frame_equal(alone, together)
    assert alone["method"].nunique() == 6
