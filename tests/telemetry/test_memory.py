import numpy as np
import pytest
import torch

from lisa_dist.telemetry.memory import memory_kind, peak_memory_gib, reset_peak_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the process' memory only without a GPU")
def test_the_process_grows_by_what_it_holds():
    assert "resident" in memory_kind()
    reset_peak_memory()
    before = peak_memory_gib()
    held = np.ones(2**27, dtype=np.uint8)  # 1/8 GiB, each page touched
    assert held[-1] == 1
    after = peak_memory_gib()
    assert 0.1 < after - before < 0.2
    del held
    assert peak_memory_gib() == pytest.approx(after, abs=0.01), "it is gone, the peak is not"
    reset_peak_memory()
    assert peak_memory_gib() < after - 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_is_counted_by_its_tensors():
    assert "GPU" in memory_kind()
    reset_peak_memory()
    before = peak_memory_gib()
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # 1/4 GiB
    assert peak_memory_gib() - before == pytest.approx(0.25, abs=0.01)
    del held
    assert peak_memory_gib() - before == pytest.approx(0.25, abs=0.01)
    reset_peak_memory()
    assert peak_memory_gib() == pytest.approx(before, abs=0.01)
