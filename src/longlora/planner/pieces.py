"""What `--sequence-parallel` costs: bytes that layers hand on between pieces of a row, and the piece with most work."""

from dataclasses import dataclass

from longlora.attention.layout import first_key, plan, query_key_pairs
from longlora.model.sequence_parallel import cuts_of, parcels
from longlora.planner.anatomy import Anatomy
from longlora.planner.flops import attention_kinds
from longlora.settings import AttentionSettings, PatternOptions


@dataclass(frozen=True)
class PieceCosts:
    """Of one forward pass of one row over all layers. The backward pass sends as much again, of gradients."""

    sent_bytes: float
    """By all GPUs of the row."""

    busiest_bytes: float
    """Sent or received by the GPU with most, layer by layer: what the others wait for."""

    imbalance: float
    """Attention of the piece with most of it, layer by layer, over the mean: 1 where all have as much."""


def piece_costs(
    anatomy: Anatomy,
    context: int,
    attention: AttentionSettings,
    pattern: str,
    group_size: int,
    pieces: int,
    number: int,
) -> PieceCosts:
    """What rows of `context` tokens cost in `pieces`, counted on the parts that attention itself is made of.

    Args:
        pattern, group_size: of the steps that are asked about.
        number: bytes of a key's number.
    """
    cuts, row = cuts_of(context, pieces), (((0, context),),)
    options = attention.options if pattern == attention.pattern else PatternOptions()
    pair = (anatomy.head_width + anatomy.value_width) * number
    sent = busiest = most = whole = 0.0
    for count, kind, layer, window in attention_kinds(anatomy, attention, pattern):
        own = options if kind == pattern else PatternOptions()
        sizes = (row, context, anatomy.heads, anatomy.key_heads, group_size, kind, layer, own)
        plans = {cut: plan(*sizes, window=window, piece=cut) for cut in cuts}
        traffic = [[0.0, 0.0] for _ in cuts]
        needs = {cut: first_key(plans[cut], cut[0]) for cut in cuts}
        for parcel in parcels(cuts, needs.__getitem__):
            size = pair * (parcel.heads.stop - parcel.heads.start) * (parcel.stop - parcel.first)
            traffic[parcel.sender][0] += size
            traffic[parcel.receiver][1] += size
        sent += count * sum(out for out, _ in traffic)
        busiest += count * max(max(each) for each in traffic)
        work = [query_key_pairs(plans[cut]) for cut in cuts]
        most += count * max(work) * pieces
        whole += count * sum(work)
    return PieceCosts(sent, busiest, most / whole)
