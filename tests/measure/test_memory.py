"""Memory: bytes counted by LiveBytes against allocations that are known, and the timeline."""

from __future__ import annotations

import gc
import json

import pytest
import torch

from workbench.errors import BadParameter, InputError, NotApplicable
from workbench.measure import CudaBytes, LiveBytes, Timeline, live_bytes, tensor_bytes

KIB = 1024


def test_live_bytes_follow_known_allocations():
    outside = torch.zeros(5000)
    with LiveBytes() as live:
        a = torch.zeros(256)  # 1 KiB
        assert live.current == KIB
        b = a + 1
        assert live.current == 2 * KIB
        del a
        assert (live.current, live.peak) == (KIB, 2 * KIB)
        c = torch.cat([b, b])
        assert (live.current, live.peak) == (3 * KIB, 3 * KIB)
        outside.add_(1)  # what was there before is not counted
        view = outside[:100]
        assert live.current == 3 * KIB
        d = torch.tensor([1.0] * 256)
        assert live.current == 4 * KIB
    del b, c, d, view
    assert (live.current, live.peak) == (0, 4 * KIB)


def test_a_storage_counts_once_until_its_last_view_dies():
    with LiveBytes() as live:
        a = torch.empty(4, 256)
        views = [a[0], a.T, a.view(-1)[10:20], a.detach(), a.unsqueeze(0).expand(9, 4, 256)]
        a.mul_(2)
        assert live.current == 4 * KIB
        del a
        assert live.current == 4 * KIB
        del views[:-1]
        assert live.current == 4 * KIB
        views.clear()
        assert live.current == 0


def test_temporaries_count_in_the_peak_only():
    x = torch.ones(256)
    with LiveBytes() as live:
        y = ((x + 1) * (x + 2)).sum()
    assert live.peak == 3 * KIB  # both sums and their product
    assert live.current == y.untyped_storage().nbytes()
    live.reset_peak()
    assert live.peak == live.current


def test_storages_that_grow_are_followed():
    with LiveBytes() as live:
        a = torch.empty(0)
        a.resize_(512)
        assert live.current == 2 * KIB
        out = torch.empty(0)
        torch.add(a, 1, out=out)
        assert live.current == 4 * KIB
    del a, out
    assert live.current == 0


def test_tensors_saved_for_backward_are_alive_until_backward():
    x = torch.ones(256, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().exp().sum()  # both exponentials are saved
        assert live.current == 2 * KIB + 4
        y.backward()
        gc.collect()
        assert live.current == KIB + 4  # x.grad and y
    assert x.grad is not None


def test_many_short_lived_tensors_leave_nothing_behind():
    with LiveBytes() as live:
        for i in range(300):
            torch.full((256,), float(i)).cumsum(0)
    assert (live.current, live.peak) == (0, 2 * KIB)


def test_the_peak_of_a_layer_is_the_sum_of_what_it_holds():
    widen, narrow_down = torch.nn.Linear(64, 256, bias=False), torch.nn.Linear(256, 64, bias=False)
    layer = torch.nn.Sequential(widen, torch.nn.ReLU(), narrow_down)
    x = torch.randn(16, 64)
    with torch.no_grad(), LiveBytes() as live:
        y = layer(x)
    wide, narrow = 16 * 256 * 4, 16 * 64 * 4
    assert live.peak == 2 * wide  # the ReLU's input and output
    assert live.current == narrow == tensor_bytes([y])


def test_two_counters_do_not_mix():
    with LiveBytes() as outer:
        a = torch.zeros(256)
        with LiveBytes() as inner:
            b = a + 1
        c = b + 1
    assert (inner.current, outer.current) == (KIB, 3 * KIB)
    del b
    assert (inner.current, outer.current) == (0, 2 * KIB)
    del c


def test_tensor_bytes_counts_each_storage_once_and_whole():
    a, b = torch.zeros(256), torch.zeros(512, dtype=torch.bfloat16)
    assert tensor_bytes([a, a[:3], a.view(16, 16).T, b]) == 2 * KIB
    assert tensor_bytes([a[:3]]) == KIB  # a slice keeps all of it alive
    assert tensor_bytes([]) == 0
    assert tensor_bytes([torch.empty(10**6, device="meta")]) == 0
    assert tensor_bytes([torch.zeros(1000, 1000).to_sparse()]) == 0


def test_tensor_bytes_looks_into_wrapper_subclasses():
    class Packed(torch.Tensor):
        """Looks like a float tensor, holds bytes and a scale."""

        @staticmethod
        def __new__(cls, codes, scale):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes, scale):
            self.codes, self.scale = codes, scale

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

        @classmethod
        def __tensor_unflatten__(cls, inner, meta, size, stride):
            return cls(inner["codes"], inner["scale"])

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    packed = Packed(torch.zeros(1000, dtype=torch.uint8), torch.zeros(1, dtype=torch.float16))
    assert tensor_bytes([packed, packed.codes]) == 1002


@pytest.fixture
def timeline() -> Timeline:
    timeline = Timeline("snapkv")
    timeline.add("read", 0, {"weights": 100, "trace": 50}, time_s=0.0)
    timeline.add("plan", 0, {"weights": 100, "trace": 50, "kv bf16": 20}, [12, 8], time_s=0.5)
    timeline.add("decode", 3, {"weights": 100, "kv bf16": 10, "kv 4-bit": 7}, [9, 8], time_s=1.5)
    return timeline


def test_a_timeline_becomes_tables(timeline):
    frame = timeline.to_frame()
    assert list(frame.columns) == ["run", "time", "phase", "step", "weights", "trace", "kv bf16", "kv 4-bit"]
    assert frame["kv 4-bit"].to_list() == [0, 0, 7]
    assert frame["trace"].to_list() == [50, 50, 0]
    layers = timeline.by_layer()
    assert layers[["time", "layer", "bytes"]].values.tolist() == [[0.5, 0, 12], [0.5, 1, 8], [1.5, 0, 9], [1.5, 1, 8]]
    assert timeline.peak == 170
    assert timeline.peaks == {"weights": 100, "trace": 50, "kv bf16": 20, "kv 4-bit": 7}


def test_an_empty_timeline_is_an_empty_table():
    assert len(Timeline().to_frame()) == len(Timeline().by_layer()) == Timeline().peak == 0
    assert list(Timeline().to_frame().columns) == ["run", "time", "phase", "step"]


def test_a_timeline_survives_json(timeline):
    again = Timeline.from_dict(json.loads(json.dumps(timeline.to_dict())))
    assert again.samples == timeline.samples and again.run == timeline.run
    assert again.to_frame().equals(timeline.to_frame())
    assert again.add("decode", 4, {}).time >= 1.5  # and can be continued
    with pytest.raises(InputError):
        Timeline.from_dict({"run": "x", "samples": [{"time": 0}]})
    with pytest.raises(InputError):
        Timeline.from_dict({})


def test_timelines_follow_one_another(timeline):
    other = Timeline("kivi")
    other.add("decode", 0, {"kv 2-bit": 5}, time_s=0.25)
    both = Timeline.concat([timeline, other])
    assert [s.run for s in both.samples] == ["snapkv"] * 3 + ["kivi"]
    assert [s.time for s in both.samples] == [0.0, 0.5, 1.5, 1.75]
    assert both.peak == 170
    assert both.to_frame()["kv 2-bit"].to_list() == [0, 0, 0, 5]
    assert len(timeline) == 3 and len(Timeline.concat([])) == 0


def test_the_clock_runs_by_itself():
    timeline = Timeline()
    times = [timeline.add("decode", step, {}).time for step in range(3)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] < 5


def test_wrong_samples_are_refused(timeline):
    with pytest.raises(BadParameter, match="phase"):
        timeline.add("writing", 0, {})
    with pytest.raises(BadParameter, match="negative"):
        timeline.add("decode", 0, {"weights": -1})
    with pytest.raises(BadParameter, match="forward"):
        timeline.add("decode", 0, {}, time_s=1.0)
    assert len(timeline) == 3


def test_cuda_bytes_refuse_other_devices():
    with pytest.raises(NotApplicable, match="LiveBytes"):
        CudaBytes(torch.device("cpu"))


class FakeAllocator:
    """The few statistics that the CUDA allocator keeps, so that the book-keeping can be tested anywhere."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.reached = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.reached)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.spike(0, reset=True))

    def spike(self, nbytes: int, reset: bool = False) -> None:
        self.reached = self.allocated if reset else max(self.reached, self.allocated + nbytes)


def test_cuda_bytes_count_only_what_the_block_added(monkeypatch):
    cuda = FakeAllocator(monkeypatch)
    cuda.allocated = 100
    cuda.spike(900)  # before the block: not its business
    with live_bytes(torch.device("cuda", 0)) as live:
        cuda.spike(50)
        assert (live.current, live.peak) == (0, 50)
        live.reset_peak()
        cuda.allocated = 110
        cuda.spike(20)
    cuda.spike(5000)  # after it: neither
    assert (live.current, live.peak) == (10, 30)
