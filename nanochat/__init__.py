"""Train your own small ChatGPT (Transformer, Mamba or hybrid) from raw text to a chat.

    import nanochat
    chat = nanochat.load("sft")
    print(chat.chat([{"role": "user", "content": "Hello!"}]))
    print(nanochat.load("rag").with_knowledge("kb").chat("Who founded Torwick?"))

The names below are imported at first use: `import nanochat` itself takes milliseconds and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "load": ("nanochat.chat", "load"),
    "Document": ("nanochat.retrieval", "Document"),
    "Engine": ("nanochat.engine.generate", "Engine"),
    "KnowledgeBase": ("nanochat.retrieval", "KnowledgeBase"),
    "Model": ("nanochat.model.lm", "LM"),
    "Tokenizer": ("nanochat.tokenizer", "Tokenizer"),
}

__all__ = ["Document", "Engine", "KnowledgeBase", "Model", "Tokenizer", "__version__", "load"]

if TYPE_CHECKING:
    from nanochat.chat import load
    from nanochat.engine.generate import Engine
    from nanochat.model.lm import LM as Model
    from nanochat.retrieval import Document, KnowledgeBase
    from nanochat.tokenizer import Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nanochat' has no attribute {name!r}; it offers {', '.join(__all__)}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
