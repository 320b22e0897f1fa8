"""Which parameters write into the residual stream, and along which axis: found by changing them, not by their names."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from interp.concepts.erasing.erasure import orthonormal
from interp.model.core import Model
from interp.model.forward import block_input, eval_mode, first_tensor, kept_rng, probe_call, replace_first
from interp.model.hooks import EMBED, StopForward
from interp.model.parts import ATTN_NAMES, MLP_NAMES, candidates, is_norm

__all__ = ["Site", "Writer", "find_sites", "find_writers", "norm_basis", "project_away", "removing"]


@dataclass(frozen=True)
class Site:
    """One side of a module where a tensor on its way into the stream can be seen.

    `norm`: the path of the norm that stands between this tensor and the stream; "" where it is what is added.
    """

    hook: str  # canonical name of the hook point that it ends up in, for messages and for additions
    path: str
    side: str  # "input" | "output"
    norm: str = ""


@dataclass(frozen=True)
class Writer:
    """A parameter that adds to the stream along one of its axes, as seen at a site."""

    name: str  # in named_parameters
    axis: int
    site: Site


def find_sites(model: Model) -> dict[str, list[Site]]:
    """Return, by the path of each block, the sites inside it, in the order of the forward; under "" those before it.

    A part that is a norm is seen at both sides: what enters it is scaled before it is added.
    """
    paths = {id(m): name for name, m in model.hf.named_modules()}
    known = {p.name for p in model.hook_points()}
    (stack, block_path), *more = model.stacks().items()
    if more:
        raise ValueError(f"{model.name} is an encoder-decoder: only models of one residual stream can be baked")

    def seen(hook: str, module: nn.Module) -> list[Site]:
        path = paths[id(module)]
        bare = not list(module.children()) and all(p.ndim < 2 for p in module.parameters())
        after = Site(hook, path, "output")
        return [Site(hook, path, "input", path), after] if bare and is_norm(path, module) else [after]

    first = f"{stack}.0.hook_resid_pre"
    start = Site(first, f"{block_path}.0", "input")
    sites = {"": [start]}
    if EMBED in known and model.place(EMBED).side == "output":
        around = seen(first, model.place(EMBED).module)
        sites[""] = [*around[:-1], start]
    for i, block in enumerate(model.blocks_of(stack)):
        found: list[Site] = []
        for kind, names in (("attn_out", ATTN_NAMES), ("mlp_out", MLP_NAMES)):
            hook = f"{stack}.{i}.hook_{kind}"
            inner = [m for n, m in candidates(block, names) if "." not in n][:1]
            for module in [model.place(hook).module] if hook in known else inner:
                found += seen(hook, module)
        path = f"{block_path}.{i}"
        sites[path] = [*found, Site(f"{stack}.{i}.hook_resid_post", path, "output")]
    return sites


def find_writers(model: Model, sites: dict[str, list[Site]], only: str | None = None) -> list[Writer]:
    """Return every parameter that writes into the stream, by changing each and looking at what the sites then hold.

    A parameter writes along an axis if a change of rank one along a vector u of that axis moves the first site that it
    reaches along u and nothing else. Blocks alike in class and shapes are looked at once. `only`: the path of one
    block. The parameters are left bit for bit as they were.
    """
    hf = model.hf
    writers = [] if only is not None else _writers_before(model, sites[""])
    (block_path,) = model.stacks().values()
    calls = _block_calls(model)
    known: dict[tuple, list[tuple[str, int, int]]] = {}
    for i, (block, (args, kwargs)) in enumerate(zip(model.blocks_of(next(iter(model.stacks()))), calls, strict=True)):
        path = f"{block_path}.{i}"
        if only not in (None, path):
            continue
        shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        key = (type(block), shapes, tuple((s.path.removeprefix(path), s.side) for s in sites[path]))
        if key not in known:

            def call(block: nn.Module = block, args: tuple = args, kwargs: dict = kwargs) -> Any:
                # cloned: some families add to their input in place
                return block(*(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs)

            known[key] = _tested(dict(block.named_parameters()), model.d_model, hf, sites[path], call)
        writers += [Writer(f"{path}.{name}", axis, sites[path][at]) for name, axis, at in known[key]]
    return writers


def _writers_before(model: Model, sites: list[Site]) -> list[Writer]:
    hf = model.hf
    (block_path,) = model.stacks().values()
    outside = {n: p for n, p in hf.named_parameters() if not n.startswith(f"{block_path}.")}

    def call() -> None:
        def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
            raise StopForward

        # registered after the sites' hooks, so that they see the input of the first block before it ends the forward
        handle = hf.get_submodule(f"{block_path}.0").register_forward_pre_hook(stop, with_kwargs=True)
        try:
            hf(**probe_call(hf))
        except StopForward:
            return
        finally:
            handle.remove()

    return [Writer(name, axis, sites[at]) for name, axis, at in _tested(outside, model.d_model, hf, sites, call)]


def _block_calls(model: Model) -> list[tuple[tuple, dict]]:
    """Return what each block is called with in a small forward."""
    calls: list[tuple[tuple, dict]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((tuple(a.clone() if isinstance(a, Tensor) else a for a in args), dict(kwargs)))

    blocks = model.blocks_of(next(iter(model.stacks())))
    handles = [b.register_forward_pre_hook(note, with_kwargs=True) for b in blocks]
    device = next(model.hf.parameters()).device
    try:
        with torch.no_grad(), eval_mode(model.hf), kept_rng(device):
            model.hf(**probe_call(model.hf))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _tested(
    parameters: dict[str, nn.Parameter], d: int, hf: nn.Module, sites: list[Site], call: Callable[[], Any]
) -> list[tuple[str, int, int]]:
    """Return (name, axis, index of the site) of the parameters that write at one of the sites.

    One that reaches no site in this forward (an expert that no token went to) goes by its like of another number.
    """
    found: list[tuple[str, int, int]] = []
    idle: list[tuple[str, int]] = []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), eval_mode(hf), kept_rng(next(hf.parameters()).device):
        before = _observe(hf, sites, call)
        for name, p in parameters.items():
            for axis in (i for i, size in enumerate(p.shape) if size == d and p.is_floating_point()):
                u = torch.randn(d, generator=generator)
                u = u / u.norm()
                with _moved(p, axis, u, generator):
                    after = _observe(hf, sites, call)
                at, along = _first_moved(before, after, u, 16 * torch.finfo(p.dtype).eps)
                if at is None:
                    idle.append((name, axis))
                elif along:
                    found.append((name, axis, at))
    like = {(re.sub(r"\d+", "#", name), axis): at for name, axis, at in found}
    alike = [(name, axis, like.get((re.sub(r"\d+", "#", name), axis))) for name, axis in idle]
    return found + [(name, axis, at) for name, axis, at in alike if at is not None]


def _first_moved(before: list[Tensor], after: list[Tensor], u: Tensor, tol: float) -> tuple[int | None, bool]:
    """Return the first site that changed, None for none, and whether it changed along u alone."""
    for at, (old, new) in enumerate(zip(before, after, strict=True)):
        delta = (new - old).double().cpu().reshape(-1, len(u))
        size = float(delta.norm())
        if size <= tol * 1e-2 * float(old.double().norm()):
            continue
        direction = u.double()
        aside = delta - (delta @ direction)[:, None] * direction
        return at, float(aside.norm()) <= max(1e-3, tol) * size
    return None, False


@contextmanager
def _moved(p: nn.Parameter, axis: int, u: Tensor, generator: torch.Generator) -> Iterator[None]:
    """Add a change of rank one along u, of the parameter's own size, and take it back bit for bit."""
    kept = p.data.clone()
    size = float(p.data.float().square().mean().sqrt()) or 0.02
    across = torch.randn([n for i, n in enumerate(p.shape) if i != axis], generator=generator)
    change = (across[..., None] * u * size * len(u) ** 0.5).movedim(-1, axis)
    p.data.add_(change.to(p.device, p.dtype))
    try:
        yield
    finally:
        p.data.copy_(kept)


def _observe(hf: nn.Module, sites: list[Site], call: Callable[[], Any]) -> list[Tensor]:
    """Return what each site holds in one call."""
    held: dict[int, Tensor] = {}

    def watch(at: int, site: Site) -> Any:
        module = hf.get_submodule(site.path)
        if site.side == "input":
            return module.register_forward_pre_hook(
                lambda m, args, kwargs: held.__setitem__(at, block_input(args, kwargs).clone()), with_kwargs=True
            )
        return module.register_forward_hook(lambda m, args, out: held.__setitem__(at, first_tensor(out).clone()))

    handles = [watch(at, site) for at, site in enumerate(sites)]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return [held[at] for at in range(len(sites))]


def norm_basis(norm: nn.Module, basis: Float[Tensor, "k d"]) -> Float[Tensor, "r d"]:
    """Return the directions whose removal before a norm removes `basis` after it (its bias aside).

    A norm multiplies by a gain g a coordinate, so what must go is g * r; less its mean where the norm first takes the
    mean of its input away. Both are read off the norm by running it. Gemma-2: g = 1 + weight.
    """
    d = basis.shape[1]
    weight = next(norm.parameters(), None)
    like = {"device": weight.device, "dtype": weight.dtype} if weight is not None else {}
    signs = torch.ones(d, dtype=torch.float64)
    signs[1::2] = -1
    patterns = [signs] if d % 2 == 0 else [signs * (torch.arange(d) < d - 1), signs * (torch.arange(d) > 0)]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return norm(x.to(**like)[None, None]).double().cpu()[0, 0]

    bias = run(torch.zeros(d))
    gain = torch.zeros(d, dtype=torch.float64)
    for pattern in patterns:
        gain = torch.where(pattern != 0, (run(pattern) - bias) * pattern, gain)
    plain, shifted = run(patterns[0]) - bias, run(patterns[0] + 3.0) - bias
    centres = bool((shifted - plain).norm() < 0.05 * plain.norm())
    rows = basis.double() * gain
    return orthonormal(rows - rows.mean(1, keepdim=True) if centres else rows)


def project_away(p: nn.Parameter, axis: int, basis: Float[Tensor, "k d"]) -> None:
    """Take the span of `basis` out of a parameter along an axis, in place; in float64, rounded once at the end."""
    flat = p.data.movedim(axis, -1)
    rows = flat.reshape(-1, flat.shape[-1])
    new = torch.empty_like(rows)
    for part in torch.arange(len(rows)).split(2**16):  # an embedding of 256,000 rows in float64 is gigabytes
        wide, way = rows[part].double(), basis.to(rows.device, torch.float64)
        new[part] = (wide - wide @ way.T @ way).to(p.dtype)
    p.data.copy_(new.reshape(flat.shape).movedim(-1, axis))


@contextmanager
def removing(hf: nn.Module, removals: list[tuple[Site, Shaped[Tensor, "k d"]]]) -> Iterator[None]:
    """Project the values at sites off the span of a basis in every forward: by hooks what baking does by weights."""

    def cut(value: Tensor, basis: Tensor) -> Tensor:
        way = basis.to(value.device, torch.promote_types(value.dtype, torch.float32))
        wide = value.to(way.dtype)
        return (wide - wide @ way.T @ way).to(value.dtype)

    def install(site: Site, basis: Tensor) -> Any:
        module = hf.get_submodule(site.path)
        if site.side == "output":
            return module.register_forward_hook(lambda m, a, out: replace_first(out, cut(first_tensor(out), basis)))

        def before(m: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            new = cut(block_input(args, kwargs), basis)
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return module.register_forward_pre_hook(before, with_kwargs=True)

    handles = [install(site, basis) for site, basis in removals]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
