"""The methods of a SentenceTransformerTrainer that `exact` overrides: those of the Trainer, with another loss."""

from typing import Any, ClassVar

from bigbatch.integrations.sentence_transformers.checks import check_batch
from bigbatch.integrations.sentence_transformers.coupled_windows import CoupledWindows
from bigbatch.integrations.transformers.trainer_mixin import ExactMixin, Windows


class CoupledMixin(ExactMixin):
    """Overrides of `SentenceTransformerTrainer`; `exact` puts it before the class of a trainer."""

    _bigbatch_package: ClassVar[str] = "sentence_transformers"

    def _bigbatch_check_ranks(self) -> None:
        """Check the arguments that a batch depends on, which may have changed since `exact`."""
        check_batch(self)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the batch of an update."""
        check_batch(self)
        return super().get_batch_samples(*args, **kwargs)

    def _bigbatch_new_windows(self) -> Windows:
        """Return what runs the windows of this trainer."""
        return CoupledWindows(self, self._bigbatch_settings)
