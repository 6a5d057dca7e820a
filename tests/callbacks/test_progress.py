from lte_lightning.callbacks.progress import said


def test_a_figure_that_is_undefined_is_said_to_be():
    found = {"pearson": None, "sparsity": 0.5, "sparsity_per_layer": [0.5], "rows": 3}
    assert said(found) == "pearson undefined, sparsity 0.5000"
