"""The other contestants: what is common to them, and which there are."""

from bigbatch.lm.bench.bigbatch_runner import Ours
from bigbatch.lm.bench.entries import OURS, Entry
from bigbatch.lm.bench.peer import Contestant, Peer


def make_contestant(entry: Entry) -> Contestant:
    """Make what is called by that name; imports no other library yet."""
    if entry.name == OURS:
        return Ours()
    from bigbatch.lm.bench.accelerate_runner import Accumulate
    from bigbatch.lm.bench.lightning_runner import LightningTrainer
    from bigbatch.lm.bench.transformers_runner import Checkpointing, Expert, Plain

    kinds: dict[str, type[Peer]] = {
        "trainer": Plain,
        "trainer-checkpointing": Checkpointing,
        "trainer-expert": Expert,
        "accelerate": Accumulate,
        "lightning": LightningTrainer,
    }
    assert entry.samples is not None, "names.SAMPLES gives every peer its own"
    return kinds[entry.name](entry.samples)
