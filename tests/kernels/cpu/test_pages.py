import torch

from lte_lightning.kernels.cpu.pages import HUGE, LINE, pack, room


def test_tensors_are_copied_one_behind_the_other():
    tensors = [torch.arange(5, dtype=torch.uint8), torch.randn(3, 7).bfloat16(), torch.empty(0), torch.randn(2, 33)]
    packed = list(pack(tensors, sum(map(room, tensors))))
    for copy, tensor in zip(packed, tensors, strict=True):
        assert copy.dtype == tensor.dtype
        assert copy.equal(tensor)
        assert copy.data_ptr() != tensor.data_ptr() or not tensor.numel()
    assert packed[0].data_ptr() % HUGE == 0
    assert packed[1].data_ptr() == packed[0].data_ptr() + LINE
    assert packed[3].data_ptr() == packed[1].data_ptr() + LINE
