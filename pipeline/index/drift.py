"""When an index is made anew instead of following the corpus: the rules, and nothing else.

| looked at | made anew |
|---|---|
| there is no whole version, or of another output | always |
| the type that the configuration now leads to | when it is another |
| rows deleted since, of all that are stored | from a tenth, where FAISS keeps them (HNSW, Refine, …) |
| the same where only their vectors are kept, on disk | from half |
| rows appended since the training | when they are more than were there then |
| imbalance of the lists | when it has doubled since the training, or is 2 more |
| recall@10, with settings tuned again | when it is under the target |
"""

from __future__ import annotations

from pipeline.index.kinds import Choice
from pipeline.index.record import IndexRecord

DEAD_INSIDE, DEAD_ON_DISK = 0.1, 0.5


def reason_before(
    record: IndexRecord, fingerprint: str, choice: Choice, *, num_new: int, num_dead: int, deletes: bool
) -> str | None:
    """Why the next version cannot follow from this one, as is known before it is made; None if it can.

    `num_new` rows come, `num_dead` will have gone in all; `deletes` says whether the type takes rows out.
    """
    if record.fingerprint != fingerprint:
        return "the output is another one"
    if choice.type != record.type:
        return f"the type is now {choice.type}, not {record.type}"
    stored = record.num_vectors + record.num_dead + num_new
    if num_dead >= stored * (DEAD_ON_DISK if deletes else DEAD_INSIDE):
        return f"{num_dead:,} of {stored:,} stored vectors are of deleted images"
    if record.num_trained and record.num_appended + num_new > record.num_trained:
        return (
            f"{record.num_appended + num_new:,} vectors came since {record.num_trained:,} were trained on"
        )
    return None


def reason_after(record: IndexRecord) -> str | None:
    """Why a version that followed is not good enough, as measured; None if it is."""
    if record.imbalance is not None and record.trained_imbalance is not None:
        limit = max(2 * record.trained_imbalance, record.trained_imbalance + 2)
        if record.imbalance > limit:
            return (
                f"its lists became uneven: {record.imbalance:.1f}, at first {record.trained_imbalance:.1f}"
            )
    if record.recall_at_10 < record.target_recall:
        return f"its recall@10 fell to {record.recall_at_10:.3f}, under {record.target_recall}"
    return None
