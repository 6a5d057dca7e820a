import pytest

from lte_lightning.cli.option_errors import explain

UNION = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lte_lightning.tasks.base.LteModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'lte_lightning.tasks.Classification':
        Option 'efficiency_wieght' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='efficiency_wieght', val='0.3')"""


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (UNION, "model: unknown name 'efficiency_wieght'; did you mean efficiency_weight?"),
        ("unrecognized arguments: --stages.x=3", "unknown option --stages.x; did you mean --stages.y?"),
        ('Parser key "data":\n  - Expected a dot import path string: GlueDta', "did you mean GlueData?"),
        ("unrecognized arguments: --zzz", "unknown option --zzz"),
        (UNION.replace("efficiency_wieght", "block_size"), "it is --data.block_size of LanguageModelData"),
        (
            UNION.replace("wieght", "weight"),
            "it is --model.efficiency_weight of Classification, Gen",
        ),
        # not MovieReviews, MmluData and others that set it themselves
        (UNION.replace("efficiency_wieght", "holdout"), "LanguageModelData, PromptData, StreamingData, TextData"),
        ("Something else\n  entirely", "Something else\n  entirely"),
    ],
)
def test_the_cause_is_said_with_the_nearest_name(message, said):
    assert said in explain(message, ["--stages.y", "--trainer.devices"])
