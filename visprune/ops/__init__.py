# SPDX-License-Identifier: Apache-2.0
"""Tensor operators of token pruning: checked input, one choice of backend, then a custom op.

Every operator takes ``backend``: ``"auto"`` (Triton for CUDA tensors where it can run, else
PyTorch), ``"triton"`` (raises :class:`visprune.errors.UnsupportedKernel` with the reasons where
it cannot) or ``"torch"``. Shapes: B images or sequences, N tokens, D features, H heads, R query
rows. All are custom ops of ``torch.library``: they trace under ``torch.compile`` and are counted
by ``torch.utils.flop_counter``.
"""

from visprune.ops.cluster import distances_to, dpc_knn, gram, separated
from visprune.ops.coverage import greedy_coverage
from visprune.ops.draw import draw_tokens, picture_checksum
from visprune.ops.grouped import rank_within, shares
from visprune.ops.hilo import hilo_attention, hilo_layer, hilo_pool
from visprune.ops.match import bipartite_pairs
from visprune.ops.neighborhood import na_av, na_qk, neighborhood_attention
from visprune.ops.ragged import (
    RAGGED_BLOCK,
    QuantizedKV,
    dequantize_kv,
    merge_attention,
    quantize_kv,
    ragged_decode,
    ragged_offsets,
)
from visprune.ops.reduce import (
    add_rows,
    bipartite_match,
    gather_tokens,
    merge_tokens,
    reduce_tokens,
    take_rows,
    unmerge_tokens,
)
from visprune.ops.rows import attention_rows, column_sums
from visprune.ops.select import greedy_diverse
from visprune.ops.sparse import lowrank_topk, sparse_attention

__all__ = [
    "RAGGED_BLOCK",
    "QuantizedKV",
    "add_rows",
    "attention_rows",
    "bipartite_match",
    "bipartite_pairs",
    "column_sums",
    "dequantize_kv",
    "distances_to",
    "dpc_knn",
    "draw_tokens",
    "gather_tokens",
    "gram",
    "greedy_coverage",
    "greedy_diverse",
    "hilo_attention",
    "hilo_layer",
    "hilo_pool",
    "lowrank_topk",
    "merge_attention",
    "merge_tokens",
    "na_av",
    "na_qk",
    "neighborhood_attention",
    "picture_checksum",
    "quantize_kv",
    "ragged_decode",
    "ragged_offsets",
    "rank_within",
    "reduce_tokens",
    "separated",
    "shares",
    "sparse_attention",
    "take_rows",
    "unmerge_tokens",
]
