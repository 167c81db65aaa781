"""Pictures show the numbers they are given, with every label readable."""

import pytest

from bench import plots
from tests.bench.rows import row, steps, wrong

pytest.importorskip("matplotlib")
MANY = [
    row(op, shape, which, dtype, fastllm=2.0, eager=eager, torch_compile=1.5, F_rms_norm=2.0)
    for op, eager in (("linear_token_logprobs", 6.0), ("rms_norm", 250.0))
    for shape in ("8192x4096", "2048x768x32000 with entropy")
    for dtype in ("fp32", "bf16")
    for which in ("forward", "forward+backward")
]
GROWING = [
    row(op, f"{length}x4096", length=length, fastllm=length / 512, eager=length / 128)
    for length in (4096, 1024, 2048)
    for op in ("rms_norm", "swiglu", "geglu")
]


def boxes(figure):
    """Every text of the figure that is seen, with where it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    unseen = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = axis.get_major_ticks() + axis.get_minor_ticks()
        unseen |= {label for t in ticks if not low <= t.get_loc() <= high for label in (t.label1, t.label2)}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in unseen]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts], figure.bbox


FIGURES = {
    **{f"many {name}": figure for name, figure in plots.figures(MANY).items()},
    **{f"one {name}": figure for name, figure in plots.figures(MANY[:1]).items()},
    **{f"growing {name}": figure for name, figure in plots.figures(GROWING).items()},
    **{f"a third {name}": figure for name, figure in plots.figures([*GROWING[::3], wrong(MANY[0])]).items()},
    **{f"training {name}": figure for name, figure in plots.figures(steps()).items()},
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_another_or_leaves_the_picture(name):
    texts, whole = boxes(FIGURES[name])
    assert len(texts) > 5
    for n, (one, box) in enumerate(texts):
        assert box.x0 >= 0, one
        assert box.x1 <= whole.x1, one
        assert box.y0 >= 0, one
        assert box.y1 <= whole.y1, one
        for other, its in texts[n + 1 :]:
            apart = box.x1 <= its.x0 or its.x1 <= box.x0 or box.y1 <= its.y0 + 2 or its.y1 <= box.y0 + 2
            assert apart, f"{one!r} over {other!r}"


def words(figure):
    return [text for text, _ in boxes(figure)[0]]


def test_bars_say_the_ratios():
    figure = plots.against_peers([row(fastllm=2.0, eager=7.0, torch_compile=1.0)], "forward")
    assert {"3.50×", "0.50×", "eager", "torch.compile"} <= set(words(figure))
    assert [round(bar.get_x() + bar.get_width(), 6) for bar in figure.axes[0].patches] == [3.5, 0.5]


def test_the_share_of_the_limit_is_where_its_point_is():
    figure = plots.limits([row(fastllm=2.0, eager=4.0), wrong(row("swiglu", fastllm=1.0, eager=4.0))])
    assert {"50%", "WRONG"} <= set(words(figure))
    points = sorted(tuple(points.get_offsets()[0]) for points in figure.axes[0].collections)
    assert points == [(25, 0), (25, 1), (50, 0)]


def test_lengths_are_a_series_only_where_nothing_else_differs():
    grown = plots.series([*GROWING, row("rms_norm", "4096x64", length=4096, fastllm=1.0)])
    assert {name: [r["length"] for r in rows] for name, rows in grown.items()} == {
        f"{op}  Lx4096  bf16  fwd": [1024, 2048, 4096] for op in ("rms_norm", "swiglu", "geglu")
    }
    assert "length" not in plots.figures(MANY)


def test_a_training_step_shows_speed_and_memory_against_the_unpatched():
    said = " ".join(words(plots.steps(steps())))
    assert "2.00× as fast" in said
    assert "0.50×" in said


def test_the_same_rows_give_the_same_file(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first, second = (plots.draw(MANY, tmp_path / folder, "kernels", ".svg", "a note") for folder in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert all("a note" in path.read_text() for path in first)
    assert max(path.stat().st_size for path in first) < 300_000
