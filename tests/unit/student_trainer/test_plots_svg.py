from xml.etree import ElementTree

from student_trainer.reports.plots import bars, curves

SVG = "{http://www.w3.org/2000/svg}"


def texts(drawn: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawn).iter(f"{SVG}text")]


def test_curves_carry_names_and_the_pages_colour_when_drawn():
    drawn = curves({"kd": [(1, 2.0), (2, 1.5)], "task & more": [(1, 1.0), (2, 0.5)]}, x="step", y="loss")
    assert {"kd", "task & more", "step", "loss"} <= set(texts(drawn))
    assert "currentColor" in drawn
    assert "#010203" not in drawn
    assert 'role="img"' in drawn


def test_names_are_shown_as_they_are_when_they_look_like_formulas():
    names = ["5 $ and 6 $", r"$\frac$", r"C:\new"]
    assert set(names) <= set(texts(curves({name: [(1, 2.0), (2, 1.5)] for name in names}, x="x", y="y")))
    assert set(names) <= set(texts(bars({name: [70.0] for name in names}, x="x")))


def test_curves_are_the_same_bytes_when_drawn_again():
    series = {"a": [(1.0, 2.0), (2.0, 1.5)]}
    assert curves(series, x="x", y="y") == curves(series, x="x", y="y")


def test_bars_have_a_dot_per_value_when_some_groups_are_empty():
    drawn = bars({"none": [70.0, 71.0], "kd": [72.5], "later": []}, x="top-1 %")
    assert {"none", "kd", "later"} <= set(texts(drawn))
    assert any("axis starts at" in text for text in texts(drawn))
    assert drawn.count("<use") - bars({"none": [70.0, 70.5], "kd": [], "later": []}, x="top-1 %").count("<use") == 1
