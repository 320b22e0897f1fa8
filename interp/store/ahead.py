"""Computing ahead in the background: a thread for a chunk, and a copy of the model that it has to itself."""

import atexit
import copy
import threading
import weakref
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import torch

from interp.model.anatomy import AnatomyError
from interp.model.forward import kept_rng
from interp.model.loading import Model
from interp.model.tokens import Window
from interp.store.chunks import Loaded, Producer
from interp.store.job import Job

PATIENCE = 10.0  # seconds that a thread gets to end its batch, or to get on with a text that it waits for


def can_copy(model: Model) -> bool:
    """Whether `apart` can copy a model: not a TransformerBridge, and neither dispatched nor quantised."""
    quantised = getattr(model.hf, "hf_quantizer", None) or getattr(model.hf, "quantization_method", None)
    return model.backend == "native" and not model.offloaded and quantised is None


def apart(job: Job) -> Model:
    """Return the job's model once more, its modules copied and every weight shared, for a thread of its own.

    Hook points are hooks on modules, and evaluation mode is a flag on them: two threads that run one model would read
    each other's values. Foreign hooks on the model go on working in the copy. Raises ValueError where a context of ours
    is open on it, which the copy would keep for ever.
    """
    model, hf = job.model, job.model.hf
    memo: dict[int, Any] = {id(t): t for t in chain(hf.parameters(), hf.buffers())}
    for module in hf.modules():
        for hook in chain(module._forward_hooks.values(), module._forward_pre_hooks.values()):
            if str(getattr(hook, "__module__", "")).startswith("interp."):
                raise ValueError(
                    f"a context that reads or edits {model.name} is open, which a stream read ahead in the background "
                    "cannot follow; begin to read outside of it, or give prefetch=False"
                )
            memo[id(hook)] = hook
    with kept_rng(model.device):
        own = Model(copy.deepcopy(hf, memo), model.tokenizer, name=model.name, blocks=model.blocks_path)
        _settle(own, job)
    return own


def _settle(model: Model, job: Job) -> None:
    """Run padded rows once: what a Model finds out then, random state put aside, is not to be found in the thread."""
    rows = [Window(np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.int32)) for n in (2, 1)]
    batch = job.cut.collate(rows)
    with suppress(AnatomyError):  # raised again should such rows come
        model.run(batch.ids, batch.mask, positions=batch.positions if batch.masked else None)


class Ahead(threading.Thread):
    """A thread that loads one chunk."""

    def __init__(self, producer: Producer):
        super().__init__(name="interp-stream", daemon=True)
        self._producer, self._halted = producer, threading.Event()
        self.loaded: Loaded | None = None
        self.error: BaseException | None = None
        _running.add(self)
        self.start()

    def run(self) -> None:
        torch.get_num_threads()  # a new thread takes over the number that was set only when it is first asked
        try:
            self.loaded = self._producer.load(self._halted.is_set)
        except BaseException as error:  # the consumer raises it
            self.error = error

    def halt(self) -> None:
        """Have the thread stop at its next batch, and wait for that; not for ever, should its text hang."""
        self._halted.set()
        self.join(PATIENCE)


_running: "weakref.WeakSet[Ahead]" = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """End threads before the interpreter does: torch must not run on while it goes down."""
    for thread in list(_running):
        if thread.is_alive():
            thread.halt()
