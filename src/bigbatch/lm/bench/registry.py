"""Factory of contestants by name."""

from bigbatch.lm.bench.bigbatch_runner import BigbatchRunner
from bigbatch.lm.bench.entries import OURS, Entry
from bigbatch.lm.bench.peer import Contestant, Peer


def make_contestant(entry: Entry) -> Contestant:
    """Create the contestant of an entry; its library is imported when it runs."""
    if entry.name == OURS:
        return BigbatchRunner()
    assert entry.samples is not None, "every peer has a number of samples in SAMPLES"
    if entry.name.startswith("torchtitan"):
        from bigbatch.lm.bench.torchtitan_runner import TorchtitanRunner

        return TorchtitanRunner(entry.samples, attention="varlen" if entry.name.endswith("varlen") else "sdpa")
    if entry.name.startswith("hand-written"):
        from bigbatch.lm.bench.hand_written import HandWrittenRunner

        return HandWrittenRunner(entry.samples, attention="sdpa" if entry.name.endswith("sdpa") else "varlen")
    from bigbatch.lm.bench.accelerate_runner import AccelerateRunner
    from bigbatch.lm.bench.lightning_runner import LightningRunner
    from bigbatch.lm.bench.transformers_runner import TransformersCheckpointing, TransformersDefault, TransformersTuned

    kinds: dict[str, type[Peer]] = {
        "trainer": TransformersDefault,
        "trainer-checkpointing": TransformersCheckpointing,
        "trainer-expert": TransformersTuned,
        "accelerate": AccelerateRunner,
        "lightning": LightningRunner,
    }
    return kinds[entry.name](entry.samples)
