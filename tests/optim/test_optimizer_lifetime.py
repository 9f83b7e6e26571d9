"""An optimizer that is no longer used gives its memory back, and with it the process groups of its context."""

from __future__ import annotations

import gc
import weakref

from small_models import batch_of, model_config, small_setup, train_step


def test_model_and_optimizer_are_freed_when_nobody_holds_them():
    gpt, optimizer, _ = small_setup()
    train_step(gpt, optimizer, 1e-3, batch_of(model_config()))
    held = [weakref.ref(x) for x in (gpt, optimizer, optimizer.context, gpt.queue)]
    del gpt, optimizer
    gc.collect()
    assert [x() for x in held] == [None] * len(held)


def test_a_hook_that_holds_the_optimizer_would_be_seen():
    """Negative control: what a tensor's hook holds is never collected."""
    gpt, optimizer, _ = small_setup()
    parameter, held = next(gpt.parameters()), weakref.ref(optimizer)
    handle = parameter.register_post_accumulate_grad_hook(lambda _, kept=optimizer: None)
    del gpt, optimizer
    gc.collect()
    assert held() is not None
    handle.remove()
