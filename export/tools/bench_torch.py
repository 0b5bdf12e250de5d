"""torch's own answer to the question of `marginalia bench`: the student's weights without an export. Needs the train extra.

python -m export.tools.bench_torch '{"student": ..., "mode": "eager" | "channels_last" | "compile", ...}'
"""

import shutil
from typing import Any

import numpy as np

from export.tools.bench_protocol import Facts, TorchTask
from export.tools.bench_worker import Prepared, converse, picture
from pipeline.imaging import resize


class Unavailable(RuntimeError):
    """This mode cannot run here; the message says what to install."""


def prepare(task: TorchTask) -> Prepared:
    """Work "run": the exported graph's work, from uint8 images to class ids and confidence on the host, in torch."""
    try:
        import torch
    except ImportError as error:
        raise Unavailable("torch is not installed; it comes with the train extra") from error
    if task.mode == "compile" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise Unavailable("torch.compile needs a C++ compiler; install g++ or clang++")

    from training import inference
    from training.models import segmenter

    torch.set_num_threads(task.threads)
    device = inference.device()
    model, _ = segmenter.load(task.student, device)
    if task.mode == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image_HWC = picture(*task.size)
    plan = resize.plan(*image_HWC.shape[:2], long_side=task.long_side, stride=task.stride)
    ready_NHWC = np.ascontiguousarray(np.repeat(resize.apply(image_HWC, plan)[None], task.batch, axis=0))
    layout = torch.channels_last if task.mode == "channels_last" else torch.contiguous_format

    def answer(image_BHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image_BCHW = image_BHWC.to(torch.float32).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        return inference.answer(model(image_BCHW))

    compiled: Any = torch.compile(answer) if task.mode == "compile" else answer

    def run() -> object:
        with torch.inference_mode():
            label_BHW, confidence_BHW = compiled(torch.from_numpy(ready_NHWC).to(device))
            return label_BHW.cpu().numpy(), confidence_BHW.cpu().numpy()

    run()  # compiles, where asked to; the first measured peak includes it
    facts = Facts(provider=device.type, precision="fp32", threads=task.threads, tensor=ready_NHWC.shape)
    return Prepared({"run": run}, facts)


if __name__ == "__main__":
    converse(TorchTask, prepare)
