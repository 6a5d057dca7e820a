"""Union sparsity: which experts a batch needs, against counting by hand."""

import itertools

import pytest
import torch

from lte_lightning import LteConfig, RouterTrace, convert, set_mode
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.errors import UserError

SIZES = 4
# Whether a batch of the family's two FFNs is one token of each row
DECODES = {
    ("bert", "classification"): (False, False),
    ("gpt2", "classification"): (False, False),
    ("llama", "lm"): (True, True),
    ("opt", "lm"): (True, True),
    ("bart", "seq2seq"): (False, True),
}


@pytest.fixture
def routed(build, scatter):
    """`routed(family, head)`: a converted model whose scores lie on both sides of the threshold."""

    def routed(family, head):
        model = scatter(convert(build(family, head=head), LteConfig(16, "random"), progress=False))
        set_mode(model, "hard")
        return model

    return routed


def counted(active_BTE, real_BT, size, decodes):
    """Idle pairs and batches of neighbouring rows, expert by expert."""
    idle = batches = 0
    for first in range(0, len(real_BT) - size + 1, size):
        rows = []
        for active_TE, real_T in zip(active_BTE[first : first + size], real_BT[first : first + size], strict=True):
            rows.append([expert for expert, real in zip(active_TE.tolist(), real_T.tolist(), strict=True) if real])
        # a decoding step has a token of every row, as long as all go on; a whole row is its only step otherwise
        steps = list(zip(*rows, strict=False)) if decodes else [list(itertools.chain(*rows))]
        for tokens in steps:
            batches += 1
            idle += sum(not any(expert) for expert in zip(*tokens, strict=True))
    return idle, batches


def test_a_score_on_the_threshold_does_not_run(routed):
    model = routed("bert", "classification")
    ids_BT = torch.arange(14).view(2, 7) + 3
    with torch.no_grad(), RouterTrace(model, torch.ones(2, 7)) as trace:
        model(input_ids=ids_BT)
    for name, scores_NE in trace.scores().items():
        expert_ffns(model)[name].threshold = float(scores_NE.max())  # that of one token and expert, exactly
    idle_LK, batches_LK = trace.idle_experts(2)
    assert idle_LK.equal(batches_LK * scores_NE.shape[1])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("family", "head"), DECODES, ids="-".join)
def test_equals_counting_by_hand(routed, family, head, side):
    model, generator = routed(family, head), torch.Generator().manual_seed(1)
    lengths = (7, 3, 5, 5, 2, 6, 7)  # the seventh has no neighbour, the last three make no batch of four
    ids_BT = torch.randint(3, 60, (7, 7), generator=generator)
    mask_BT = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    mask_BT = mask_BT.flip(1) if side == "left" else mask_BT
    masks = [mask_BT.long()]
    batch = {"input_ids": ids_BT, "attention_mask": masks[0]}
    if head == "seq2seq":
        masks.append(mask_BT.flip(0).long())
        batch |= {"decoder_input_ids": ids_BT.flip(0), "decoder_attention_mask": masks[1]}
    with torch.no_grad(), RouterTrace(model, *masks) as trace:
        model(**batch)
    idle_LK, batches_LK = trace.idle_experts(SIZES)
    for layer, ffn in enumerate(expert_ffns(model).values()):
        real_BT = masks[ffn.stack].bool()
        active_BTE = torch.zeros(7, 7, ffn.experts, dtype=torch.bool)
        active_BTE[real_BT] = list(trace.scores().values())[layer] > ffn.threshold
        decodes = DECODES[family, head][layer]
        expected = [counted(active_BTE, real_BT, 2**k, decodes) for k in range(SIZES)]
        assert list(zip(idle_LK[layer].tolist(), batches_LK[layer].tolist(), strict=True)) == expected
        assert expected[3] == (0, 0)
        assert 0 < expected[0][0] < ffn.experts * expected[0][1]
        if decodes:  # one token needs what it runs
            assert expected[0] == (int((~active_BTE[real_BT]).sum()), sum(lengths))


def test_without_a_mask_every_token_is_real_and_forwards_add_up(routed, batch):
    model, ids_BT = routed("llama", "lm"), batch["input_ids"]
    found = []
    for times, masks in ((1, ()), (2, ()), (1, (torch.ones_like(ids_BT),))):
        with torch.no_grad(), RouterTrace(model, *masks) as trace:
            for _ in range(times):
                model(input_ids=ids_BT)
        found.append(torch.stack(trace.idle_experts(3)))
    assert found[1].equal(2 * found[0])
    assert found[2].equal(found[0])


def test_opt_needs_a_mask_to_know_its_rows(routed, batch):
    model = routed("opt", "lm")
    with torch.no_grad(), RouterTrace(model) as trace:
        model(batch["input_ids"])
    with pytest.raises(UserError, match=r"flattens its rows; pass token_mask_BT to RouterTrace"):
        trace.idle_experts(2)
