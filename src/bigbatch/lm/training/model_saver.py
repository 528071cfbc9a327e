"""The trained model on disk: a transformers folder, or LoRA adapters, gathered first if the ranks shard the model."""

from safetensors import SafetensorError

from bigbatch.errors import BigbatchError, os_reason
from bigbatch.lm.distributed.ranks import RankContext, gather_full_model, gather_trained
from bigbatch.lm.files import PARTIAL, remove
from bigbatch.lm.model.adapters import save_adapters
from bigbatch.lm.model.meta_model import copy_to_meta
from bigbatch.lm.model.pretrained import save_model
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.runs.file_names import MODEL
from bigbatch.lm.training.setup import TrainingSetup


class ModelSaver:
    """Saves the model of a run.

    Args:
        setup: Before its model is sharded.
        ranks: The processes of the run; the first one writes.
    """

    def __init__(self, setup: TrainingSetup, ranks: RankContext) -> None:
        self._setup = setup
        self._ranks = ranks
        self._meta_model = None
        if ranks.are_sharded and not setup.config.saves_adapters:
            self._meta_model = copy_to_meta(setup.model)

    def save(self, directory: RunDirectory) -> None:
        """Save the model, or its adapters alone. Collective if it is sharded.

        Raises:
            BigbatchError: The folder cannot be written.
        """
        model, tokenizer, config = self._setup.model, self._setup.tokenizer, self._setup.config
        trained = None
        if self._meta_model is not None:
            model = gather_full_model(model, self._meta_model)
        elif self._ranks.are_sharded:
            trained = gather_trained(model)
        if not self._ranks.is_first:
            return
        folder = directory.adapter if config.saves_adapters else directory.model
        try:
            if config.saves_adapters:
                save_adapters(
                    model,
                    tokenizer,
                    folder,
                    base=config.model,
                    state=trained,
                    write_more=self._setup.model_setup.write_files,
                )
                for name in (MODEL, MODEL + PARTIAL):  # what an earlier version saved when this run was stopped
                    remove(directory.path / name)
            else:
                save_model(model, tokenizer, folder, write_more=self._setup.model_setup.write_files)
        except (OSError, SafetensorError) as error:
            raise BigbatchError(
                f"{folder} cannot be written: {os_reason(error)}. The checkpoints are complete: continue from "
                f"the last one with bigbatch resume {directory.path}."
            ) from error
