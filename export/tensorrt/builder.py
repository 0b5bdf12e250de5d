"""ONNX bytes -> TensorRT engine bytes.

`tensorrt` (11 and later) and `tensorrt_rtx` have one Python interface, so everything here takes the imported module as
an argument.
"""

import logging
from dataclasses import dataclass
from typing import Any

from export.bundle.manifest import INPUT
from export.tensorrt.installation import EngineError
from export.tensorrt.profile import Profile

# tf32 is the fp32 graph with products rounded to 10 bits of mantissa; elsewhere only the graph's own types decide.
PRECISIONS = ("fp32", "tf32", "fp16", "int8")
RECIPE = 1  # part of an engine's key: raise it when `build` makes another engine of the same arguments
SCRATCH = 4 << 30  # bytes a layer may use for scratch; without a limit the builder may take the whole card
_CHANNELS = 3
_log = logging.getLogger(__name__)


def logger(module: Any) -> Any:
    """TensorRT's messages into our log: warnings and worse; `complaints` keeps the text of the errors.

    It must live as long as anything made with it.
    """

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.complaints: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = int(severity)  # 0 internal error, 1 error, 2 warning, 3 info, 4 verbose
            if level <= 1:
                self.complaints = [*self.complaints[-9:], message]
            if level <= 2:
                _log.log(logging.ERROR if level <= 1 else logging.WARNING, "%s: %s", module.__name__, message)

    return Log()


@dataclass(frozen=True)
class Built:
    """A serialised engine, and the timings of kernels that make the next build on this card faster (may be empty)."""

    engine: bytes
    timings: bytes


def build(
    module: Any, model: bytes, *, precision: str, profile: Profile, name: str = "model.onnx", timings: bytes = b""
) -> Built:
    """Build an engine for the card at hand (`tensorrt_rtx` needs none: it finishes the kernels when it loads one).

    Args:
        model: ONNX with its weights inside: uint8 NHWC `image` -> uint8 NHW `label`, `confidence`.
        precision: one of `PRECISIONS`. It changes the build only between fp32 and tf32; types come from the graph.
        name: what error messages call the model.
        timings: `Built.timings` of an earlier build on an equal card; anything unusable is ignored by TensorRT.

    Raises:
        EngineError: unknown precision, or the graph cannot be parsed or built; names `name`, and the node where
            TensorRT tells it.
    """
    if precision not in PRECISIONS:
        raise EngineError(f"{name}: unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    log = logger(module)
    builder = module.Builder(log)
    network, _parser = _parse(module, builder, log, model, name)  # the parser must live as long as the network
    config = _configure(module, builder, precision, profile)

    timed = module.__name__ != "tensorrt_rtx"  # there these calls do nothing and are deprecated since 1.2
    if timed:
        config.set_timing_cache(config.create_timing_cache(timings), ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(f"{name}: no engine can be built: {'; '.join(log.complaints) or 'TensorRT gave no reason'}")
    return Built(bytes(engine), bytes(config.get_timing_cache().serialize()) if timed else b"")


def _parse(module: Any, builder: Any, log: Any, model: bytes, name: str) -> tuple[Any, Any]:
    """The network of an ONNX model, and the parser that owns its weights. Raises EngineError."""
    # Every network of version 11 is strongly typed; 10 must be told.
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, log)
    if not parser.parse(model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = [f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors]
        raise EngineError(f"{name}: TensorRT cannot read the graph: {'; '.join(reasons) or 'no reason given'}")

    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    if inputs != [INPUT]:
        raise EngineError(f"{name}: has inputs {inputs}, not only {INPUT!r}; export it again")
    return network, parser


def _configure(module: Any, builder: Any, precision: str, profile: Profile) -> Any:
    """Precision, scratch memory and the sizes of the input."""
    config = builder.create_builder_config()
    if precision != "tf32":  # on unless switched off; fp32 is to agree with ONNX Runtime
        config.clear_flag(module.BuilderFlag.TF32)
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, SCRATCH)

    sizes = builder.create_optimization_profile()
    shapes = [(*shape, _CHANNELS) for shape in (profile.min_NHW, profile.opt_NHW, profile.max_NHW)]
    sizes.set_shape(INPUT, *shapes)
    config.add_optimization_profile(sizes)
    return config
