"""A GPU that is not there, so that tests/test_cuda.py can run everywhere: `PYTHONPATH=tests pytest -p pretend_gpu tests/test_cuda.py`.

Tensors "on cuda" are on the CPU and carry a mark, which goes from the arguments of every function to its results. As on
a real device, arguments on two devices are an error, so is numpy, and, when torch is asked for it, most of what makes the
host wait. Not pretended: kernels and their rounding, streams, pinned memory, other threads and processes, torch.compile,
and what torch's own functions and autograd do inside (gradient clipping does not work, for one)."""
import time
import numpy as np, torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda", 0)
MOVES = {"to", "cpu", "cuda", "type_as"}
ASSIGNS = {"copy_", "_foreach_copy_", "swap_tensors", "_has_compatible_shallow_copy_type"}       # may have both devices
WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__format__", "__repr__", "__contains__", "nonzero", "argwhere",
         "unique", "unique_consecutive", "masked_select", "bincount", "is_nonzero", "equal", "allclose", "new_tensor", "eigh", "eigvalsh",
         "svd", "svdvals", "linalg_eigh", "linalg_eigvalsh", "linalg_svd", "linalg_svdvals"}
VIEWS = {"grad", "data", "T", "mT", "H", "mH", "real"}         # properties that are tensors

def tensors_in(x): return [t for t in tree_flatten(x)[0] if isinstance(t, torch.Tensor)]
def is_cuda(device): return device is not None and torch.device(device).type == "cuda"
def marked(t): return t.__dict__.get("on_cuda", False)
def mark(out, on):
    tree_map_only(torch.Tensor, lambda t: t.__dict__.update(on_cuda=on), out)
    return out

class PretendGPU(TorchFunctionMode):
    strict = False         # whether waiting is an error

    def wait(self, what):
        if self.strict: raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name, tensors = dict(kwargs or {}), getattr(func, "__name__", str(func)), tensors_in((args, kwargs or {}))
        here = bool(tensors) and marked(tensors[0])
        if name in ("__get__", "__set__"): return self.attribute(func, name, func.__self__.__name__, args, here)
        if name in ("numpy", "__array__") and here: raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name in ("pin_memory", "is_pinned"):
            if here: raise RuntimeError("only dense CPU tensors can be pinned")
            return args[0] if name == "pin_memory" else True
        if name in MOVES: return self.move(func, name, args, kwargs)
        self.check(name, args, kwargs, tensors)
        if name in ASSIGNS: return func(*args, **kwargs)
        there = any(map(marked, tensors))
        if kwargs.get("device") is not None:
            there = is_cuda(kwargs["device"])
            if there and kwargs.get("generator") is not None: raise RuntimeError("Expected a 'cuda' device type for generator")
            if there and name in ("tensor", "as_tensor") and not here: self.wait(f"{name} from the host")
            kwargs["device"] = "cpu"
        return mark(func(*args, **kwargs), there)

    def attribute(self, func, name, what, args, here):
        "A property of a tensor, read or set."
        if name == "__set__":
            func(*args)
            mark(args[0], marked(args[1]) if what == "data" else here)
            return None
        if what == "device": return CUDA if here else func(*args)
        if what in ("is_cuda", "is_cpu"): return here == (what == "is_cuda")
        return mark(func(*args), here) if what in VIEWS else func(*args)

    def check(self, name, args, kwargs, tensors):
        "Raise for arguments on two devices, and for what waits."
        here = bool(tensors) and marked(tensors[0])
        if any(map(marked, tensors)) and (name in WAITS or name == "where" and len(args) + len(kwargs) == 1): self.wait(name)
        index = tensors_in(args[1]) if name in ("__getitem__", "__setitem__") else []
        if here and any(t.dtype in (torch.bool, torch.uint8) for t in index): self.wait("a mask as index")
        lists = name in ("__getitem__", "__setitem__") and any(isinstance(i, (list, np.ndarray)) for i in
                                                               (args[1] if isinstance(args[1], tuple) else args[1:2]))
        if here and (lists or any(not marked(t) for t in index)): self.wait("an index on the host")        # which is allowed
        value = args[2] if name == "__setitem__" and isinstance(args[2], torch.Tensor) else None          # may come from anywhere
        if value is not None and value.ndim and marked(value) != here: self.wait("a value from another device")
        both = len({*map(marked, tensors)}) > 1
        if both and name in ("copy_", "_foreach_copy_") and not kwargs.get("non_blocking", args[2:] and args[2]): self.wait(name)
        allowed = {*map(id, index)} if here else set()
        sides = {marked(t) for t in tensors if (marked(t) or t.ndim) and t is not value and id(t) not in allowed}
        if len(sides) == 2 and name not in ASSIGNS: raise RuntimeError(f"Expected all tensors to be on the same device: {name}")

    def move(self, func, name, args, kwargs):
        "A tensor to another device or type; what changes the device is a copy."
        (x, *rest), here = args, marked(args[0])
        there = dict(cpu=False, cuda=True).get(name, here)
        if name == "cuda": func, rest, kwargs = torch.Tensor.to, ["cpu"], {k: v for k, v in kwargs.items() if k == "non_blocking"}
        elif rest and isinstance(rest[0], torch.Tensor): there = marked(rest[0])
        elif rest and isinstance(rest[0], (str, int, torch.device)): there, rest[0] = is_cuda(rest[0]), "cpu"
        elif kwargs.get("device") is not None: there, kwargs["device"] = is_cuda(kwargs["device"]), "cpu"
        if here and not there or there and not here and not (kwargs.get("non_blocking") or any(r is True for r in rest)):
            self.wait(f"{name} from one device to the other")
        out = func(x, *rest, **kwargs)
        if here != there and out is x: out = x.detach().clone().requires_grad_(x.requires_grad) if x.is_leaf else x.clone()
        return mark(out, there)

class Event:
    def __init__(self, enable_timing=False): pass
    def record(self): self.at = time.perf_counter()
    def elapsed_time(self, other): return 1000*(other.at - self.at)

def pytest_configure(config):
    mode, autocast, load, make_subclass = PretendGPU(), torch.autocast, torch.load, torch.Tensor._make_subclass
    nothing = dict.fromkeys(("reset_peak_memory_stats", "synchronize", "set_device", "set_rng_state_all", "set_rng_state", "empty_cache",
                             "manual_seed_all", "manual_seed"), lambda *args, **kw: None)
    values = dict(is_available=True, is_initialized=True, is_bf16_supported=True, is_current_stream_capturing=False, device_count=1,
                  current_device=0, get_device_name="pretended", memory_allocated=1 << 20, max_memory_allocated=64 << 20,
                  mem_get_info=(8 << 30, 8 << 30), get_rng_state_all=[])
    pretended = nothing | {k: lambda *args, v=v: v for k, v in values.items()} | dict(
        Event=Event, set_sync_debug_mode=lambda to: setattr(mode, "strict", to == "error"))
    for name, f in pretended.items(): setattr(torch.cuda, name, f)
    torch.accelerator.is_available = lambda: False         # or a DataLoader would try to pin
    torch.autocast = lambda device_type, *args, **kw: autocast("cpu", *args, **kw)
    torch.load = lambda *args, map_location="cpu", **kw: mark(load(*args, map_location="cpu", **kw), is_cuda(map_location))
    torch.Tensor._make_subclass = staticmethod(lambda cls, data, *args, **kw: mark(make_subclass(cls, data, *args, **kw), marked(data)))
    mode.__enter__()
