import pytest
import torch
from sklearn import metrics as sklearn

from lte_lightning.errors import UserError
from lte_lightning.tasks.metrics import CLASS_METRICS, NUMBER_METRICS, make_metric, require_metric

CLASSES = ("bad", "fine", "good")
GENERATOR = torch.Generator().manual_seed(0)
TRUE = torch.randint(3, (60,), generator=GENERATOR)
TAKEN = torch.where(torch.rand(60, generator=GENERATOR) < 0.6, TRUE, torch.zeros_like(TRUE))


def averaged(function):
    return {average: lambda t, p, a=average: function(t, p, average=a) for average in ("macro", "weighted", "micro")}


YARDSTICKS = {
    "accuracy": sklearn.accuracy_score,
    "accuracy_macro": sklearn.balanced_accuracy_score,
    "matthews": sklearn.matthews_corrcoef,
    "kappa": sklearn.cohen_kappa_score,
    "f1": averaged(sklearn.f1_score)["macro"],
    **{f"f1_{name}": score for name, score in averaged(sklearn.f1_score).items()},
    **{f"precision_{name}": score for name, score in averaged(sklearn.precision_score).items()},
    **{f"recall_{name}": score for name, score in averaged(sklearn.recall_score).items()},
}


@pytest.mark.parametrize("name", YARDSTICKS)
def test_figures_are_those_of_scikit_learn(name):
    metric = make_metric(name, CLASSES)
    for part in range(0, 60, 20):
        metric.update(TAKEN[part : part + 20], TRUE[part : part + 20])
    found = metric.compute()
    assert found[name].item() == pytest.approx(YARDSTICKS[name](TRUE, TAKEN), abs=1e-6)
    counts = sklearn.confusion_matrix(TRUE, TAKEN).tolist()
    matrix = [[found["confusion_matrix"][row].get(column, 0) for column in CLASSES] for row in CLASSES]
    assert matrix == counts
    metric.reset()
    metric.update(TRUE, TRUE)
    assert metric.compute()[name].item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", [name for name in CLASS_METRICS if name not in YARDSTICKS])
def test_the_other_averages_are_there(name):
    metric = make_metric(name, CLASSES)
    metric.update(TRUE, TRUE)
    assert metric.compute()[name].item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", NUMBER_METRICS)
def test_metrics_of_numbers(name):
    metric = make_metric(name, None)
    values = torch.linspace(0, 1, 10)
    metric.update(values, values)
    assert metric.compute().item() == pytest.approx(0.0 if name in ("mae", "mse") else 1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "regression", "complaint"),
    [
        ("f1_makro", None, r"unknown metric 'f1_makro' \(do you mean 'f1_macro'\?\)"),
        ("pearson", False, "unknown classification metric 'pearson'"),
        ("f1", True, r"unknown regression metric 'f1'.*pearson, spearman"),
    ],
)
def test_other_names_are_refused(name, regression, complaint):
    with pytest.raises(UserError, match=complaint):
        require_metric(name, regression)
