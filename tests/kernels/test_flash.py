"""How FlashAttention is called, on stand-ins with its packages' signatures that compute what those promise."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import documents
from torch import Tensor

from nanochat.kernels import attention as kernels
from nanochat.kernels import flash
from nanochat.kernels.attention import attention, attention_ref
from nanochat.kernels.segments import document_starts


def promised(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: tuple[int, int], start=None) -> Tensor:
    """Keys i - left ... i + right of query i; the last query stands at the last key (or at its row's `start`)."""
    left, right = window
    assert right == 0
    return attention_ref(q, k, v, window=left + 1 if left >= 0 else 0, start=start, scale=scale)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    assert causal
    return promised(q, k, v, softmax_scale, window_size)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1),
):  # fmt: skip
    assert causal
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale,
                       window_size=window_size, enable_gqa=True)  # fmt: skip


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, softmax_scale=None, causal=False, window_size=(-1, -1)
):
    assert causal
    assert cache_seqlens.dtype == torch.int32
    return promised(q, k_cache, v_cache, softmax_scale, window_size, start=cache_seqlens - q.shape[1]), None


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    parts = [slice(a, b) for a, b in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:])]
    ys = [promised(query[None, p], key[None, p], value[None, p], scale, window_size)[0] for p in parts]
    return torch.cat(ys)


FLASH = SimpleNamespace(
    __name__="flash_attn", flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func,
    flash_attn_with_kvcache=flash_attn_with_kvcache,
)  # fmt: skip
TORCH = SimpleNamespace(__name__="torch.nn.attention.varlen", varlen_attn=varlen_attn)


@pytest.fixture(params=[FLASH, TORCH], ids=["flash_attn", "torch"], autouse=True)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = request.param.__name__
    monkeypatch.setenv("NANOCHAT_KERNEL_ATTENTION", "flash")
    monkeypatch.setattr(flash, "find", lambda device, width: (name, ""))
    monkeypatch.setattr(flash.importlib, "import_module", lambda name: request.param)
    return name


def inputs(n_time: int, n_source: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(n_time)
    return [torch.randn(2, n, heads, 8, generator=g) for n, heads in ((n_time, 4), (n_source, 2), (n_source, 2))]


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", [(20, 20), (1, 20), (7, 20)])
def test_says_what_the_oracle_says(sizes: tuple[int, int], packed: bool, window: int) -> None:
    options = {"segments_BT": documents(2, sizes[0])} if packed else {}
    q, k, v = inputs(*sizes)
    found = attention(q, k, v, window=window, scale=0.3, **options)
    torch.testing.assert_close(found, attention_ref(q, k, v, window=window, scale=0.3, **options))


@pytest.mark.parametrize("window", [0, 3])
def test_rows_at_different_positions_of_a_cache(window: int) -> None:
    q, k, v = inputs(2, 20)
    for options in ({"start": torch.tensor([4, 18])}, {"lengths": torch.tensor([19, 7])}):
        found = attention(q, k, v, window=window, **options)
        torch.testing.assert_close(found, attention_ref(q, k, v, window=window, **options))


def test_the_check_of_a_package_notices_a_wrong_number(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flash._problem(package, "cpu") == ""
    module = flash.importlib.import_module(package)
    name = "varlen_attn" if package != "flash_attn" else "flash_attn_varlen_func"
    right = getattr(module, name)

    def wrong(*args, **options):
        return right(*args, **{**options, "window_size": (3, 0)})

    wrong.__signature__ = inspect.signature(right)
    monkeypatch.setattr(module, name, wrong)
    assert "off by" in flash._problem(package, "cpu")
    monkeypatch.delattr(module, name)
    assert name in flash._problem(package, "cpu")


def test_documents_are_counted_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(flash, "document_starts", lambda s: calls.append(1) or document_starts(s))
    segments, (q, k, v) = documents(2, 20), inputs(20, 20)
    for _ in range(3):
        attention(q, k, v, segments_BT=segments)
    segments[:, 10:] += 1
    changed = attention(q, k, v, segments_BT=segments)
    assert len(calls) == 2
    torch.testing.assert_close(changed, attention_ref(q, k, v, segments))


def test_the_default_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(2, 20, 4, 8))
    assert kernels._default(q, 0, None) == ("flash", "")
    q.dtype = torch.float32
    assert kernels._default(q, 0, None) == ("sdpa", "FlashAttention takes no float32")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels._default(q, 5, None)[0] == "flex"
