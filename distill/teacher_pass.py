"""The frozen teacher as a student sees it: logits and the feature maps of its hint points, at the least cost."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from ..models.folding import folded, frozen, twin
from ..models.taps import LayerTaps, module_path
from .device_memory import Halving
from .execution import Execution

# Under autocast these take bf16 whatever their weights are; others may need what they were made for.
_BF16_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says of one batch, without gradient.

    Attributes:
        logits: float32 [B, classes]; None if they are not needed.
        features: by module path, float32 [B, C, H, W].
    """

    logits: Tensor | None
    features: Mapping[str, Tensor]

    def part(self, start: int, stop: int) -> "TeacherOutputs":
        """Of the images from `start` to before `stop`."""
        logits = None if self.logits is None else self.logits[start:stop]
        return TeacherOutputs(logits, {path: feature[start:stop] for path, feature in self.features.items()})


class TeacherPass:
    """Runs a copy of the teacher: in eval and inference mode, folded, no further than its last layer that is read.

    Features are copied when their layer has run, so no later operation can write over them.

    Args:
        teacher: the network; left as it is.
        layers: module paths that are read.
        needs_logits: whether the logits are read.
        image_shape: (channels, height, width) of one image as the teacher takes it.
        execution: where and how it runs.
        threads: how many threads may run it at once.
        halving: whether batches are computed in halves; None: only if this pass runs out of memory.

    Raises:
        InputError: a layer that the teacher does not have; a layer that does not run or gives no feature map, where
            the logits are not needed (else the first pass says so).
    """

    def __init__(
        self,
        teacher: nn.Module,
        layers: Sequence[str],
        needs_logits: bool,
        image_shape: tuple[int, int, int],
        execution: Execution,
        threads: int = 1,
        halving: Halving | None = None,
    ) -> None:
        self._halving = halving or Halving("the teacher", execution.place)
        layers = tuple(dict.fromkeys(layers))
        network = folded(teacher, image_shape, layers) if execution.fold_teacher else frozen(teacher)
        network = network.to(execution.place).to(memory_format=torch.channels_last)
        if execution.precision == "bf16":
            _store_bf16(network)
        self._idle: SimpleQueue[_Runner] = SimpleQueue()
        for copy in [network, *(twin(network) for _ in range(threads - 1))]:
            self._idle.put(_Runner(copy, layers, needs_logits, image_shape, execution))

    def __call__(self, images: Tensor) -> TeacherOutputs:
        """Images [B, C, H, W] → what is read."""
        runner = self._idle.get()
        try:
            return self._halving.run(len(images), lambda: self._by_parts(runner, images), runner.forget)
        finally:
            self._idle.put(runner)

    def _by_parts(self, runner: "_Runner", images: Tensor) -> TeacherOutputs:
        bounds = self._halving.bounds(len(images))
        if len(bounds) == 1:
            return runner.run(images)
        return _joined([runner.run(images[start:stop]) for start, stop in bounds])


class _Runner:
    """One network with its taps, which one thread at a time runs."""

    def __init__(
        self,
        network: nn.Module,
        layers: tuple[str, ...],
        needs_logits: bool,
        image_shape: tuple[int, int, int],
        execution: Execution,
    ) -> None:
        self._network, self._layers, self._execution = network, layers, execution
        self._taps: LayerTaps[Tensor] = LayerTaps(network, layers, _kept)
        self._stop = None if needs_logits else _Stop(network, self._taps, layers, image_shape, execution)
        # A network that is left in the middle cannot be compiled.
        self._compiled = execution.compile != "off" and needs_logits
        if self._compiled:
            network.compile(mode=None if execution.compile == "default" else execution.compile)

    def run(self, images: Tensor) -> TeacherOutputs:
        """Images [B, C, H, W] → what is read."""
        with torch.inference_mode(), self._execution.autocast():
            logits = self._network(images) if self._stop is None else self._stop.run(images)
        features = dict(zip(self._layers, self._taps.take(), strict=True))
        if self._compiled:
            # What compiled code gives, taps in it included, is of inference mode, or a CUDA graph's, for its next run.
            features = {path: _kept(path, feature) for path, feature in features.items()}
        return TeacherOutputs(_kept("logits", logits) if self._stop is None else None, features)

    def forget(self) -> None:
        """Holds nothing of a pass that failed."""
        self._taps.forget()


def _joined(parts: Sequence[TeacherOutputs]) -> TeacherOutputs:
    """One after the other, as of one batch."""
    logits = [part.logits for part in parts if part.logits is not None]
    features = {path: torch.cat([part.features[path] for part in parts]) for path in parts[0].features}
    return TeacherOutputs(torch.cat(logits) if logits else None, features)


def _kept(_path: str, output: Tensor) -> Tensor:
    """A float32 copy that gradients may flow beside: a tensor of inference mode may not be part of a loss."""
    with torch.inference_mode(False):
        return output.to(torch.float32, copy=True)


def _store_bf16(network: nn.Module) -> None:
    """Spares autocast the conversion of every weight in every pass."""
    for module in network.modules():
        if type(module) in _BF16_MODULES:
            module.to(torch.bfloat16)


class _LastLayerRan(Exception):  # noqa: N818 (no error: the way out of any network's code)
    """Nothing more of the network is wanted."""


class _Stop:
    """Leaves a network's forward pass as soon as the last of some layers has run for the last time."""

    def __init__(
        self,
        network: nn.Module,
        taps: LayerTaps[Tensor],
        layers: Sequence[str],
        image_shape: tuple[int, int, int],
        execution: Execution,
    ) -> None:
        self._network = network
        self._last, self._runs = self._last_run(taps, layers, image_shape, execution)
        self._left = 0
        # After the tap of the same layer, for hooks run in the order in which they were made.
        network.get_submodule(module_path(self._last)).register_forward_hook(self._count)

    def run(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] → nothing of value: what is wanted was read by taps."""
        self._left = self._runs
        with suppress(_LastLayerRan):
            self._network(images)
        return images

    def _count(self, *_call: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise _LastLayerRan

    def _last_run(
        self, taps: LayerTaps[Tensor], layers: Sequence[str], image_shape: tuple[int, int, int], execution: Execution
    ) -> tuple[str, int]:
        """The layer that ran last in a whole pass, and how often it had run by then."""
        ran: list[str] = []
        modules = {path: self._network.get_submodule(module_path(path)) for path in layers}
        handles = [
            module.register_forward_hook(lambda *_call, path=path: ran.append(path)) for path, module in modules.items()
        ]
        try:
            with torch.inference_mode(), execution.autocast():
                self._network(torch.zeros(1, *image_shape, device=execution.place))
        finally:
            for handle in handles:
                handle.remove()
        # Fails if one of them did not run.
        taps.take()
        return ran[-1], Counter(ran)[ran[-1]]
