import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification


@pytest.fixture
def tiny_bert():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(vocab_size=64, initializer_range=0.3, **sizes)).eval()
