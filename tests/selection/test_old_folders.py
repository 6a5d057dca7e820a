"""Models saved before 26 November 2026: two methods had a bias at the output, and no file described the selector."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lte_lightning import LteConfig, RouterTrace, convert, from_pretrained, save_pretrained, set_mode
from lte_lightning.core.model.experts import expert_ffns


@pytest.mark.parametrize("name", ["d2dmoe", "dejavu"])
def test_a_folder_with_biases_selects_as_it_did(name, tiny_bert, tmp_path):
    model = convert(tiny_bert, LteConfig(8, selector=name, target_sparsity=0.5), progress=False)
    for ffn in expert_ffns(model).values():
        if name == "d2dmoe":
            ffn.selector.set_common_level(0.4)
    set_mode(model, "hard")
    folder = save_pretrained(model, tmp_path / "saved")
    stored = load_file(folder / "lte_routers.safetensors")
    biases = {f"{layer}.bias": torch.randn(8) for layer in expert_ffns(model)}
    save_file(stored | biases, folder / "lte_routers.safetensors")
    description = json.loads((folder / "lte_config.json").read_text())
    del description["selector"]
    (folder / "lte_config.json").write_text(json.dumps(description))

    loaded, inputs = from_pretrained(folder, backend="dense-mask"), {}
    for layer, ffn in expert_ffns(loaded).items():
        ffn.register_forward_pre_hook(lambda ffn, given, layer=layer: inputs.update({layer: given[0]}))
    with torch.no_grad(), RouterTrace(loaded) as trace:
        loaded(input_ids=torch.randint(0, 64, (3, 7)))
    for layer, scores_NE in trace.scores().items():
        inner_NI = inputs[layer].flatten(0, 1) @ stored[f"{layer}.first"].T
        inner_NI = inner_NI.relu() if name == "d2dmoe" else inner_NI
        predicted_NE = inner_NI @ stored[f"{layer}.second"].T + biases[f"{layer}.bias"]
        if name == "d2dmoe":
            predicted_NE = predicted_NE.abs()
            expected_NE = predicted_NE > 0.4 * predicted_NE.amax(1, keepdim=True)
        else:
            expected_NE = torch.zeros_like(predicted_NE).scatter(1, predicted_NE.topk(4).indices, 1.0) > 0
        assert scores_NE.bool().equal(expected_NE)

    again = load_file(save_pretrained(loaded, tmp_path / "again") / "lte_routers.safetensors")
    assert {key for key in again if key.endswith(".bias")} == set(biases)
