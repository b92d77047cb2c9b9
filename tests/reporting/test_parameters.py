import numpy as np
import pandas as pd

from clinfuse.reporting.parameters import Axis, parameter_figure


def long(methods, scores=(("bone", "psnr"),), amplitudes=(0.0, 2.0)):
    rows = [
        {"method": m, "roi": roi, "metric": metric, "misregistration_mm": mm}
        | {"mean": n + mm, "low": n, "high": n + 1}
        for n, m in enumerate(methods)
        for roi, metric in scores
        for mm in amplitudes
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_each_series_is_drawn_by_its_numbers_in_order_whatever_order_the_rows_have():
    axis = Axis("steps", {"a 50": ("a", 50.0), "a 2": ("a", 2.0), "b 2": ("b", 2.0)})
    figure = parameter_figure(long(["a 50", "a 2", "b 2", "unknown"]), axis)
    (panel,) = figure.axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()]
    assert drawn == [([2, 50], [1, 0]), ([2], [2]), ([2, 50], [3, 2]), ([2], [4])]
    assert panel.get_xscale() == "log" and panel.get_xlabel() == "steps"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["moved by 0 mm", "moved by 2 mm", "a", "b"]


def test_a_number_that_may_be_zero_has_a_linear_axis_and_a_score_a_panel():
    axis = Axis("eta", {"x": ("", 0.0), "y": ("", 0.2)})
    scores = [("bone", "psnr"), ("brain", "ssim"), ("whole", "ssim"), ("lesion", "dice")]
    figure = parameter_figure(long("xy", scores), axis)
    shown = [panel for panel in figure.axes if panel.axison]
    assert len(shown) == 4 and {panel.get_xscale() for panel in shown} == {"linear"}
    np.testing.assert_array_equal(shown[0].get_xticks(), [0.0, 0.2])
