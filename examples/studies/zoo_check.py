"""One architecture of torchvision or timm: build it, find the smallest input it accepts, compare.

What a converted model must be is checked on two random images: equal outputs and gradients at full
rank, finite outputs at rank 1; and what a fused one must be: equal outputs. `zoo.py` runs this for
every architecture there is.
"""

import copy
import importlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from examples.benchmarks.bench import torchvision_shim

torchvision_shim.install()

import torch  # noqa: E402
import torchvision  # noqa: E402 (needs the line above)
from torch import Tensor, nn  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import sepconv  # noqa: E402
from sepconv.graph.state import without_history  # noqa: E402

try:
    import timm
except ModuleNotFoundError:  # then the zoo is torchvision's
    timm = None

MILLION = 1_000_000
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 384)
GRADIENTS = 10
ZERO = 1e-5  # a gradient this much smaller than others is rounding: of the bias of keys, say
NEARLY_ZERO = 1e-2  # as layer scales start with
TOLERANCE = 1e-4  # of outputs and gradients in float32; above it float64 decides
NUDGES = 8
EXACT = 1e-8  # of both in float64; above it the original's own rounding decides

Images = Tensor | list[Tensor]


def torchvision_names() -> list[str]:
    """Classification, segmentation, detection and video models; the quantised ones have no twin."""
    parts = ("", ".segmentation", ".detection", ".video")
    modules = [importlib.import_module("torchvision.models" + part) for part in parts]
    return [f"torchvision/{n}" for m in modules for n in torchvision.models.list_models(module=m)]


def timm_names() -> list[str]:
    """Every timm architecture."""
    if timm is None:
        return []
    return [f"timm/{name}" for name in timm.list_models(pretrained=False)]


def family(name: str) -> str:
    """The source file of a timm model, the library of any other."""
    library, _, model = name.partition("/")
    return timm.models._registry._model_to_module[model] if library == "timm" else library


def build(name: str) -> nn.Module:
    """The architecture with random weights, in eval mode."""
    library, _, model = name.partition("/")
    if library == "timm":
        return timm.create_model(model, pretrained=False).eval()
    options: dict[str, Any] = {"weights": None}
    builder = torchvision.models.get_model_builder(model)
    if ".detection" in builder.__module__ or ".segmentation" in builder.__module__:
        options["weights_backbone"] = None
    if ".detection" in builder.__module__:
        options["num_classes"] = 5  # suppression runs once a class
        if not model.startswith("ssd"):
            options.update(min_size=64, max_size=96)
        # Few candidates: what follows them is not converted, and slow without compiled operators.
        if "rcnn" in model:
            options.update(rpn_pre_nms_top_n_test=20, rpn_post_nms_top_n_test=10)
        else:
            options.update(topk_candidates=20)
    if model in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # takes half a minute
    return builder(**options).eval()


def size(name: str) -> dict[str, int]:
    """Numbers of parameters and of convolutions."""
    try:
        with torch.device("meta"):
            model = build(name)
    except NotImplementedError:  # its initialisation looks at values
        model = build(name)
    return _size(model)


def _size(model: nn.Module) -> dict[str, int]:
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "convolutions": sum(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()),
    }


def smallest_images(name: str, model: nn.Module) -> Images:
    """Two random images of the smallest size that the model accepts."""
    if "torchvision.models.detection" in type(model).__module__:
        return [torch.rand(3, 64, 80), torch.rand(3, 80, 64)]
    channels, sizes = 3, list(SIZES)
    if name.startswith("timm/"):
        config = model.pretrained_cfg
        channels, default, _ = config["input_size"]
        if config.get("fixed_input_size"):
            sizes = [default]
        elif config.get("min_input_size"):
            sizes = [config["min_input_size"][-1], default]
        else:
            sizes = [size for size in SIZES if size < default] + [default]
    error: Exception | None = None
    for size in sizes:
        shapes = [(2, channels, size, size)]
        if "torchvision.models.video" in type(model).__module__:
            shapes = [(2, 3, frames, size, size) for frames in (4, 16)]
        for shape in shapes:
            x = torch.rand(shape)
            try:
                with torch.no_grad():
                    model(x)
            # Other people's code on an input that may be too small for it.
            except Exception as caught:
                error = caught
            else:
                return x
    raise RuntimeError(f"no size of {sizes} runs: {error}")


def usual_image(name: str, images: Images) -> Images:
    """One image of the size that the model was designed for."""
    if isinstance(images, list) or images.dim() == 5:
        return images
    size = 224
    if name.startswith("timm/"):
        size = timm.get_pretrained_cfg(name[5:], allow_unregistered=True).input_size[-1]
    return torch.rand(1, images.shape[1], size, size)


def outputs(model: nn.Module, images: Images) -> list[Tensor]:
    """Every floating point tensor that the model returns.

    Of a detector these are the maps that its backbone and its head compute: sorting and
    suppression would turn a rounding error into another set of boxes.
    """
    if isinstance(images, Tensor):
        found = tree_leaves(_plain(model(images)))
    else:
        with _recording(model) as found:
            model(images)
        found = tree_leaves(found)
        heads = getattr(model, "roi_heads", nn.Module())
        for part, size in (("box_head", 7), ("mask_head", 14), ("keypoint_head", 14)):
            if getattr(heads, part, None) is not None:
                generator = torch.Generator().manual_seed(0)
                x = torch.rand(2, model.backbone.out_channels, size, size, generator=generator)
                found.append(getattr(heads, part)(x.to(next(model.parameters()).dtype)))
    return [y for y in found if isinstance(y, Tensor) and y.is_floating_point()]


def redraw(model: nn.Module) -> int:
    """Give random values to weights that start at (nearly) zero; return how many there were.

    They end residual branches and heads, and would hide whatever stands before them.
    """
    found = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.numel() == 0 or name.endswith("bias") or p.abs().max() > NEARLY_ZERO:
                continue
            found += 1
            if p.dim() < 2:
                p.uniform_(0.2, 0.4)
            else:
                p.normal_(std=0.02)
    return found


def settle_norms(model: nn.Module, images: Images) -> None:
    """Let every BatchNorm that can adopt the statistics of the images.

    With those that it starts with, signals die away in a deep random network, and its output hardly
    depends on its input.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm, norm.momentum) for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    try:
        with torch.no_grad():
            model(images)
    # One value per channel, say; then the statistics stay as they are.
    except Exception:
        pass
    for norm, momentum in before:
        norm.momentum = momentum
    model.eval()


# torchvision compiles its own operators at first use, for a minute.
@torch.compiler.set_stance("force_eager")
def check_convert(name: str, report_to: Callable[[dict[str, Any]], None]) -> None:
    """Report what conversion did to the model, step by step, so that a crash loses only the last.

    The keys are those of the columns of `docs/zoo.md`.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = build(name)
    report_to(_size(model) | {"redrawn": redraw(model)})
    images = smallest_images(name, model)
    report_to({"input": list(images.shape if isinstance(images, Tensor) else images[0].shape)})

    seconds, full = _timed(lambda: sepconv.convert(model, rank="full", first_conv=True))
    made = sepconv.report(full)
    reasons = Counter(layer.reason for layer in made.layers if layer.status != "converted")
    report_to(
        {
            "converted": len(made.converted),
            "skipped": dict(reasons),
            "level": made.trace_level,
            "convert_full_s": seconds,
        }
    )
    with torch.no_grad():
        report_to(compare((outputs(model, images), {}), (outputs(full, images), {})))
    settle_norms(model, images)
    settled = dict(model.named_buffers())
    for key, buffer in full.named_buffers():
        buffer.copy_(settled[key])
    expected = outputs_and_gradients(model, images)
    # Where two images give nearly the same output, an error would hardly show in it.
    spread = [_relative(y[:1], y[1:2]) for y in expected[0] if y.shape[0] > 1]
    found = compare(expected, outputs_and_gradients(full, images))
    report_to({"spread": max(spread, default=0.0), "gradients": len(expected[1])})
    report_to({f"settled_{key}": value for key, value in found.items()})
    if not max(found.values()) <= TOLERANCE:
        # Once more without the rounding that a network amplifies.
        exact = compare(in_double(model, images), in_double(full, images))
        report_to({f"settled_{key}_float64": value for key, value in exact.items()})
        if not max(exact.values()) <= EXACT:
            original, nudged = in_double(model, images), _nudged(_double(images))
            own = [compare(original, outputs_and_gradients(model, x)) for x in nudged]
            worst = {key: max(found[key] for found in own) for key in own[0]}
            report_to({f"own_{key}_float64": value for key, value in worst.items()})
        model.float()
    del full

    report_to(check_fused(model, images, expected[0]))
    with torch.no_grad():
        forward, _ = _timed(lambda: model(usual_image(name, images)))
        copying, _ = _timed(lambda: copy.deepcopy(model, without_history(model)))
        seconds, small = _timed(lambda: sepconv.convert(model, rank=1, first_conv=True))
        finite = all(bool(y.isfinite().all()) for y in outputs(small, images))
    report_to({"forward_s": forward, "copy_s": copying, "convert_s": seconds, "rank_1": finite})
    report_to({"status": "done"})


def check_fused(model: nn.Module, images: Images, expected: list[Tensor]) -> dict[str, Any]:
    """How many layers `sepconv.fuse` fused, at which level, and the error of the outputs."""
    fused = sepconv.fuse(model)
    made = sepconv.report(fused)
    with torch.no_grad():
        error = compare((expected, {}), (outputs(fused, images), {}))["error"]
        found = {"fused": len(made.fused), "fuse_level": made.trace_level, "fuse_error": error}
        if not error <= TOLERANCE:
            twice = sepconv.fuse(model.double())
            images = _double(images)
            exact = compare((outputs(model, images), {}), (outputs(twice, images), {}))
            found["fuse_error_float64"] = exact["error"]
            model.float()
    return found


def compare(
    expected: tuple[list[Tensor], dict[str, Tensor]], got: tuple[list[Tensor], dict[str, Tensor]]
) -> dict[str, float]:
    """Largest relative differences of outputs, and of the gradients that both have."""
    assert len(expected[0]) == len(got[0]), "another number of outputs"
    found = {"error": max(map(_relative, expected[0], got[0]))}
    size = {key: float(g.abs().max()) for key, g in expected[1].items()}
    clear = [key for key in size if key in got[1] and size[key] > ZERO * max(size.values())]
    if clear:
        found["gradient_error"] = max(_relative(expected[1][k], got[1][k]) for k in clear)
    return found


def outputs_and_gradients(
    model: nn.Module, images: Images
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients of a random sum of them by some unconverted parameters."""
    torch.manual_seed(1)
    model.zero_grad()
    found = outputs(model, images)
    generator = torch.Generator().manual_seed(2)
    terms = [
        (y * torch.randn(y.shape, generator=generator).to(y)).sum() / y.detach().abs().max()
        for y in found
        if y.requires_grad and y.numel() and y.detach().abs().max() > 0
    ]
    if terms:
        torch.stack(terms).sum().backward()
    # Filters have other names in a converted model, or are not there at all.
    names = [key for key, p in model.named_parameters() if p.dim() <= 2]
    sample = set(names[:: max(1, len(names) // GRADIENTS)])
    gradients = {
        k: p.grad for k, p in model.named_parameters() if k in sample and p.grad is not None
    }
    model.zero_grad()
    return [y.detach() for y in found], gradients


def in_double(model: nn.Module, images: Images) -> tuple[list[Tensor], dict[str, Tensor]]:
    return outputs_and_gradients(model.double(), _double(images))


def _double(images: Images) -> Images:
    return [x.double() for x in images] if isinstance(images, list) else images.double()


def _nudged(images: Images) -> Iterator[Images]:
    """The images with some values one rounding away, up or down, several times."""
    generator = torch.Generator().manual_seed(3)

    def nudge(x: Tensor) -> Tensor:
        steps = torch.randint(-1, 2, x.shape, generator=generator)
        return x * (1 + steps.to(x) * torch.finfo(x.dtype).eps)

    for _ in range(NUDGES):
        yield [nudge(x) for x in images] if isinstance(images, list) else nudge(images)


def _relative(expected: Tensor, got: Tensor) -> float:
    """Largest difference over the largest value; NaN and infinity must agree exactly."""
    if expected.shape != got.shape or not torch.equal(expected.isfinite(), got.isfinite()):
        return float("inf")
    expected, got = (torch.nan_to_num(t, 0, 0, 0) for t in (expected, got))
    difference = (expected - got).abs().max() if expected.numel() else torch.tensor(0.0)
    return float(difference / expected.abs().max()) if difference > 0 else 0.0


@contextmanager
def _recording(model: nn.Module) -> Iterator[list[Any]]:
    found: list[Any] = []
    parts = [model.backbone, model.rpn.head if hasattr(model, "rpn") else model.head]
    handles = [p.register_forward_hook(lambda m, args, y: found.append(_plain(y))) for p in parts]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _plain(y: Any) -> Any:
    """Named tuples of googlenet and inception as plain ones, other containers as they are."""
    return tuple(y) if isinstance(y, tuple) else y


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()  # one thread; another process on the same core does not count
    result = run()
    return time.process_time() - start, result
