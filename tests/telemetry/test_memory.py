import numpy as np
import pytest
import torch

from lisa_dist.telemetry.memory import current_memory_gib, memory_kind, peak_memory_gib, reset_peak_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the process' memory only without a GPU")
def test_the_process_grows_by_what_it_holds():
    assert "resident" in memory_kind()
    before = current_memory_gib()
    held = np.ones(2**27, dtype=np.uint8)  # 1/8 GiB, each page touched
    after = current_memory_gib()
    assert 0.1 < after - before < 0.2
    assert peak_memory_gib() >= after - 0.01
    assert held[-1] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_is_counted_by_its_tensors():
    assert "GPU" in memory_kind()
    reset_peak_memory()
    before = current_memory_gib()
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # 1/4 GiB
    assert current_memory_gib() - before == pytest.approx(0.25, abs=0.01)
    del held
    assert current_memory_gib() == pytest.approx(before, abs=0.01)
    assert peak_memory_gib() - before == pytest.approx(0.25, abs=0.01)
