"""Recursive language models, exactly and fast.

>>> from rlm_engine import load_model, Sampling, Depth
>>> model = load_model("chat")
>>> for token in model.generate("Once upon a time", Sampling(seed=7), Depth(max_steps=6)):
...     print(token.text, token.depth)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlm_engine.errors import EngineError, InputError, ModelError, UsageError
from rlm_engine.version import __version__

if TYPE_CHECKING:
    from rlm_engine.batch import Completion as Completion
    from rlm_engine.decoding.interface import Depth as Depth
    from rlm_engine.generate import LensStep as LensStep
    from rlm_engine.generate import Model as Model
    from rlm_engine.generate import Scored as Scored
    from rlm_engine.generate import bundled_models as bundled_models
    from rlm_engine.generate import load_model as load_model
    from rlm_engine.generation import Generation as Generation
    from rlm_engine.generation import Speculation as Speculation
    from rlm_engine.generation import Summary as Summary
    from rlm_engine.sampling import Sampling as Sampling
    from rlm_engine.trace import Alternative as Alternative
    from rlm_engine.trace import Token as Token
    from rlm_engine.trace import TokenTrace as TokenTrace

# Imported on first use: `import rlm_engine` (and with it `rlm-chat --version`) must not load numpy or tokenizers.
_LAZY = {
    "Completion": "batch",
    "Depth": "decoding.interface",
    "Generation": "generation",
    "LensStep": "generate",
    "Model": "generate",
    "Scored": "generate",
    "Speculation": "generation",
    "Summary": "generation",
    "bundled_models": "generate",
    "load_model": "generate",
    "Sampling": "sampling",
    "Alternative": "trace",
    "Token": "trace",
    "TokenTrace": "trace",
}

__all__ = ["EngineError", "InputError", "ModelError", "UsageError", "__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rlm_engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"rlm_engine.{_LAZY[name]}"), name)
